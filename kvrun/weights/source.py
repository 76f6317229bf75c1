"""A source of tensors: what safetensors folders and GGUF files have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

DTYPES = ("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q8_0", "q4_k", "q5_k", "q6_k")
"""Storage kinds that the native packer reads as they lie; other GGUF kinds are dequantized to f32 by the reader."""


@dataclass(frozen=True)
class RawTensor:
    """A tensor's bytes as the file has them, row-major. shape: logical elements, outermost first.

    data: a writable or read-only buffer of exactly the bytes of `shape` in `dtype`, private to the caller.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: object


class TensorSource(Protocol):
    """Tensors by the file's own names. Reads with pread, never by mapping: a file cut short while open is an error
    (ModelError), not a bus error."""

    def names(self) -> list[str]:
        """Every tensor's name."""

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(dtype as `read` will give it, shape) without reading data. ModelError if there is none of that name."""

    def stored(self, name: str) -> str:
        """The file's own name of the tensor's storage: "BF16", "Q6_K", ... Where it is none of DTYPES, `read`
        dequantizes to f32."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> RawTensor:
        """Rows [start, stop) of the tensor (of its first dimension)."""

    def fingerprint(self) -> tuple:
        """What tells the content of the files from any other, without reading all of them."""

    @property
    def path(self) -> Path:
        """The folder or file."""

    def close(self) -> None:
        """Closes the files."""

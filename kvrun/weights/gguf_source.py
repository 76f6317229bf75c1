"""Tensors of a GGUF file."""

from __future__ import annotations

import os
from functools import lru_cache
from math import prod
from pathlib import Path

from kvrun.errors import ModelError, show
from kvrun.weights.blob import fingerprint, read_into
from kvrun.weights.gguf_file import GgufFile, GgufTensor
from kvrun.weights.source import DTYPES, RawTensor

_STEP = 1 << 22  # elements dequantized at a time: bounds the package's temporaries to some tens of MiB


@lru_cache
def _can_dequantize(kind: int, block_bytes: int) -> bool:
    """Tries it on one block: the package keeps no public list."""
    import numpy as np
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, block_bytes), np.uint8), GGMLQuantizationType(kind))
    except NotImplementedError:
        return False
    return True


class GgufSource:
    """TensorSource over an opened GgufFile. Kinds of DTYPES as they lie, every other that the gguf package can
    dequantize as f32."""

    def __init__(self, file: GgufFile):
        self.file = file
        self._fd = os.dup(file.fd)
        self._open = True

    def names(self) -> list[str]:
        return list(self.file.tensors)

    def stored(self, name: str) -> str:
        """The kind that the file itself holds: "Q4_1", "Q6_K", ..."""
        return self._tensor(name).dtype.upper()

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        t = self._tensor(name)
        return (t.dtype if t.dtype in DTYPES else "f32"), t.shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> RawTensor:
        import numpy as np

        t = self._tensor(name)
        stop = t.shape[0] if stop is None else stop
        if not 0 <= start < stop <= t.shape[0]:
            raise ModelError(f"{self.file.path}: rows {start} to {stop} of {show(name)}, which has {t.shape[0]}")
        row = prod(t.shape[1:])
        first, count = start * row, (stop - start) * row
        if first % t.block or count % t.block:
            raise ModelError(f"{self.file.path}: rows {start} to {stop} of {show(name)} cut a {t.dtype} block")
        shape = (stop - start, *t.shape[1:])
        if t.dtype in DTYPES:
            data = np.empty(count // t.block * t.block_bytes, np.uint8)
            self._fill(t, first, data)
            return RawTensor(name, t.dtype, shape, data)
        return RawTensor(name, "f32", shape, self._dequantize(t, first, count).view(np.uint8))

    @property
    def path(self) -> Path:
        return self.file.path

    def fingerprint(self) -> tuple:
        return fingerprint(self._fd, self.file.path)

    def close(self) -> None:
        if self._open:
            self._open = False
            os.close(self._fd)

    def _tensor(self, name: str) -> GgufTensor:
        try:
            t = self.file.tensors[name]
        except KeyError:
            raise ModelError(f"{self.file.path}: tensor {show(name)} is missing") from None
        if t.dtype not in DTYPES and not _can_dequantize(t.type, t.block_bytes):
            raise ModelError(f"{self.file.path}: tensor {show(name)} is {t.dtype}, which cannot be dequantized")
        return t

    def _fill(self, t: GgufTensor, first: int, data) -> None:
        """Blocks from element `first` on into `data` (uint8)."""
        read_into(self._fd, data, t.offset + first // t.block * t.block_bytes, self.file.path, self.file.repair)

    def _dequantize(self, t: GgufTensor, first: int, count: int):
        """`count` elements from `first` on, as float32 [count]."""
        import numpy as np
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        out = np.empty(count, np.float32)
        step = max(_STEP // t.block, 1) * t.block
        for at in range(0, count, step):
            n = min(step, count - at)
            raw = np.empty((n // t.block, t.block_bytes), np.uint8)
            self._fill(t, first + at, raw)
            out[at:at + n] = dequantize(raw, GGMLQuantizationType(t.type)).reshape(-1)
        return out

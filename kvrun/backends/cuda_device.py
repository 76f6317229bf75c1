"""What the executor asks of a device: memory, one stream of work, and replays. Kernels, copies and their order are the
library's; see kernels/kvrun.h."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from kvrun.backends.native import ffi
from kvrun.errors import KvrunError, OutOfMemoryError


class Memory(Protocol):
    """Device memory. address: where it starts, a multiple of 64 at least."""

    n_bytes: int

    @property
    def address(self) -> int:
        """Where it starts, on the device."""

    def floats(self, offset: int, *shape: int) -> Any:
        """A torch view, float32, from byte `offset`."""

    def read(self, offset: int, n_bytes: int) -> np.ndarray:
        """uint8 [n_bytes] from byte `offset`, a copy, after all work that was given to the device."""

    def write(self, offset: int, data: np.ndarray) -> None:
        """Copies uint8 `data` to byte `offset`, after all work that was given to the device."""

    def close(self) -> None:
        """Gives the memory back."""


class Device(Protocol):
    """A device with one stream, on which everything runs in order."""

    name: str
    lib: Any
    stream: int

    def allocate(self, n_bytes: int, purpose: str) -> Memory:
        """OutOfMemoryError, naming `purpose`, when the device refuses."""

    def pinned(self, n_bytes: int) -> np.ndarray:
        """uint8 [n_bytes] of host memory that copies need not wait for."""

    def mark(self) -> Any:
        """Something to wait for: all work that the stream has been given."""

    def wait(self, mark: Any) -> None:
        """Returns when the marked work is done."""

    def captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """A call that repeats what `work` launches, at less cost. `work` ran before at least once; it may run now."""

    def fill(self, memory: Any, offset: int, data: np.ndarray) -> None:
        """Copies uint8 `data` of the host into the memory; `data` may change afterwards."""

    def product(self) -> Callable[..., None] | None:
        """A kvrun.backends.cuda_product.Product for many rows, or None where the library's own kernel does them all."""

    def close(self) -> None:
        """Ends the stream."""


def check(lib: Any, status: int) -> None:
    """KvrunError with the library's own words for what it refused; OutOfMemoryError where it found no memory, as to load a kernel."""
    if status:
        said = ffi.string(lib.kv_cuda_error()).decode()
        raise (OutOfMemoryError if said.endswith("out of memory") else KvrunError)(f"the CUDA kernels failed: {said}")


def copy(device: Device, to: int, source: int, n_bytes: int) -> None:
    """Copies between addresses of the host or the device, on the stream."""
    check(device.lib, device.lib.kv_cuda_copy(ffi.cast("void *", to), ffi.cast("void *", source), n_bytes, device.stream))

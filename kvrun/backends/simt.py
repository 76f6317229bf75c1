"""The emulated device: the sources of kernels/cuda built for the host (kernels/simt), in the host's memory. For tests of the
GPU path where there is no GPU; it is slow, and no command offers it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvrun.backends.memory import Arena
from kvrun.backends.native import ffi
from kvrun.errors import UsageError

LIBRARY = Path(__file__).with_name("libkvrun_simt.so")
"""Built by cmake -DKVRUN_SIMT=ON and by the tests, which put their own here."""


class HostMemory:
    """Host memory as a device's: seen through its address, and by copies."""

    def __init__(self, n_bytes: int, purpose: str) -> None:
        self._arena = Arena(n_bytes, purpose)
        self.n_bytes, self.address = n_bytes, self._arena.address

    def read(self, offset: int, n_bytes: int) -> np.ndarray:
        """See kvrun.backends.cuda_device.Memory."""
        return self._arena.bytes[offset : offset + n_bytes].copy()

    def write(self, offset: int, data: np.ndarray) -> None:
        """See Memory."""
        self._arena.bytes[offset : offset + data.size] = data.reshape(-1)

    def close(self) -> None:
        """See Memory."""
        self._arena.close()

    def floats(self, offset: int, *shape: int) -> object:
        """A torch view, float32."""
        import torch

        n = int(np.prod(shape))
        return torch.from_numpy(self._arena.bytes[offset : offset + 4 * n].view(np.float32).reshape(shape))


class SimtDevice:
    """See kvrun.backends.cuda_device.Device. Everything has been done when a call returns."""

    name = "simt"
    stream = 0

    def __init__(self, *, products: bool = False) -> None:
        """products: many rows through torch, as on a GPU."""
        if not LIBRARY.exists():
            raise UsageError(f"the emulator is not built: there is no {LIBRARY}")
        self.lib = ffi.dlopen(str(LIBRARY))
        self._products = products

    def allocate(self, n_bytes: int, purpose: str) -> HostMemory:
        """See Device."""
        return HostMemory(n_bytes, purpose)

    def pinned(self, n_bytes: int) -> np.ndarray:
        """See Device."""
        return np.zeros(n_bytes, np.uint8)

    def mark(self) -> object:
        """See Device."""
        return None

    def wait(self, mark: object) -> None:
        """See Device."""

    def captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """See Device."""
        return work

    def fill(self, memory: HostMemory, offset: int, data: np.ndarray) -> None:
        """See Device."""
        memory.write(offset, data)

    def product(self) -> Callable[..., None] | None:
        """See Device."""
        if not self._products:
            return None
        from kvrun.backends.cuda_product import Product

        return Product(self.lib, self.stream)

    def close(self) -> None:
        """See Device."""

"""A GPU through torch: memory, stream, page-locked copies and CUDA graphs. Importing this module imports torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from kvrun.backends.cuda import CudaStatus, open_library
from kvrun.backends.cuda_device import copy
from kvrun.backends.cuda_product import Product
from kvrun.errors import KvrunError, OutOfMemoryError

_CHUNK_BYTES = 32 << 20
"""Size of each of the two page-locked buffers that weights pass through."""


def _in_one_line(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, whose CUDA errors are told in one line. They may be those of work that was launched before."""

    @functools.wraps(call)
    def told(*args: Any, **settings: Any) -> Any:
        try:
            return call(*args, **settings)
        except RuntimeError as error:
            said = str(error).strip().partition("\n")[0]
            # Torch's allocator has an error of its own; contexts, graphs and modules that find no memory have the driver's.
            if isinstance(error, torch.OutOfMemoryError) or said.endswith("out of memory"):
                raise OutOfMemoryError("the GPU has no memory left; use a smaller --n-ctx or end other programs on it") from error
            raise KvrunError(f"the GPU failed: {said}") from error

    return told


class TorchMemory:
    """Device memory out of torch's allocator, whose blocks are aligned to 512 bytes."""

    def __init__(self, n_bytes: int, purpose: str, device: torch.device) -> None:
        self.n_bytes = n_bytes
        try:
            self._bytes = torch.zeros(max(n_bytes, 1), dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            free = torch.cuda.mem_get_info(device)[0]
            raise OutOfMemoryError(f"no GPU memory for {purpose} ({n_bytes / 2**20:.0f} MiB, {free / 2**20:.0f} MiB free); "
                                   "use a smaller --n-ctx or end other programs on the GPU") from None
        self.address: int = self._bytes.data_ptr()

    def floats(self, offset: int, *shape: int) -> torch.Tensor:
        """A view, float32."""
        n = int(np.prod(shape))
        return self._bytes[offset : offset + 4 * n].view(torch.float32).view(shape)

    @_in_one_line
    def read(self, offset: int, n_bytes: int) -> np.ndarray:
        """See Memory."""
        torch.cuda.synchronize(self._bytes.device)
        return self._bytes[offset : offset + n_bytes].cpu().numpy()

    @_in_one_line
    def write(self, offset: int, data: np.ndarray) -> None:
        """See Memory."""
        torch.cuda.synchronize(self._bytes.device)
        self._bytes[offset : offset + data.size].copy_(torch.from_numpy(np.ascontiguousarray(data)))
        torch.cuda.synchronize(self._bytes.device)

    def close(self) -> None:
        """See Memory. Idempotent."""
        self._bytes = torch.empty(0, dtype=torch.uint8)


class TorchDevice:
    """See kvrun.backends.cuda_device.Device. Steps and copies run on a stream of its own."""

    name = "cuda"

    @_in_one_line
    def __init__(self, status: CudaStatus, index: int = 0) -> None:
        """status: of a library that loads and a device that works."""
        self.lib = open_library(status.path)
        self._device = torch.device("cuda", index)
        torch.cuda.set_device(self._device)
        self._stream = torch.cuda.Stream(self._device)
        self.stream: int = self._stream.cuda_stream
        self._staging: list[tuple[np.ndarray, torch.cuda.Event]] = []
        self._pinned: list[torch.Tensor] = []

    @_in_one_line
    def allocate(self, n_bytes: int, purpose: str) -> TorchMemory:
        """See Device."""
        with torch.cuda.stream(self._stream):
            return TorchMemory(n_bytes, purpose, self._device)

    def pinned(self, n_bytes: int) -> np.ndarray:
        """See Device."""
        try:
            held = torch.zeros(n_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise OutOfMemoryError(f"no page-locked memory ({n_bytes / 2**20:.1f} MiB): {str(error).splitlines()[0]}") from None
        self._pinned.append(held)
        return held.numpy()

    @_in_one_line
    def mark(self) -> torch.cuda.Event:
        """See Device."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    @_in_one_line
    def wait(self, mark: torch.cuda.Event) -> None:
        """See Device."""
        mark.synchronize()

    @_in_one_line
    def captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """See Device. The work is recorded and not run."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            if isinstance(error.__context__, KvrunError):        # what failed first says more than that the capture could not be ended
                raise error.__context__ from None
            raise

        @_in_one_line
        def replay() -> None:
            with torch.cuda.stream(self._stream):
                graph.replay()

        return replay

    @_in_one_line
    def fill(self, memory: TorchMemory, offset: int, data: np.ndarray) -> None:
        """See Device. Through two page-locked buffers in turn, so that reading and copying go on side by side."""
        flat = data.reshape(-1)
        if not self._staging:
            self._staging = [(self.pinned(_CHUNK_BYTES), torch.cuda.Event()) for _ in range(2)]
        for turn, at in enumerate(range(0, flat.size, _CHUNK_BYTES)):
            buffer, free = self._staging[turn % 2]
            free.synchronize()
            n = min(_CHUNK_BYTES, flat.size - at)
            buffer[:n] = flat[at : at + n]
            copy(self, memory.address + offset + at, buffer.ctypes.data, n)
            free.record(self._stream)

    def product(self) -> Callable[..., None]:
        """See Device."""
        product = Product(self.lib, self.stream)

        @_in_one_line
        def on_stream(*args: Any, **settings: Any) -> None:
            with torch.cuda.stream(self._stream):
                product(*args, **settings)

        return on_stream

    @_in_one_line
    def close(self) -> None:
        """See Device. What was allocated is closed before."""
        self._stream.synchronize()
        self._staging, self._pinned = [], []
        torch.cuda.empty_cache()                 # what the next device gets is out of another stream's memory

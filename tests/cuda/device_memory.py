"""A device to run kernels on: the emulator, whose memory is the host's, or a GPU through torch."""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path

import numpy as np

from kvrun.backends._abi import ffi


_libc = ctypes.CDLL(None)
_libc.free.argtypes = [ctypes.c_void_p]


def _allocated(n: int) -> np.ndarray:
    """uint8 [n], aligned as a GPU's memory is, in a piece of exactly that size, so that a sanitizer sees the first byte past it."""
    at = ctypes.c_void_p()
    if _libc.posix_memalign(ctypes.byref(at), 256, n):
        raise MemoryError
    array = np.frombuffer((ctypes.c_uint8 * n).from_address(at.value), np.uint8)
    weakref.finalize(array.base, _libc.free, at.value)
    return array


class Device:
    """`lib` with kv_cuda_step, and memory that `lib`'s kernels see. Holds what it gave out until it is dropped."""

    def __init__(self, path: Path, gpu: bool) -> None:
        self.path = path
        self.lib = ffi.dlopen(str(path))
        self._gpu = gpu
        self._held = []

    def put(self, data: np.ndarray | bytes) -> int:
        """Address of a copy of `data` in device memory."""
        host = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        host = host if host.size else np.zeros(1, np.uint8)      # nothing has an address too
        if self._gpu:
            import torch

            self._held.append(torch.from_numpy(host.copy()).cuda())
            return self._held[-1].data_ptr()
        self._held.append(_allocated(host.size))
        self._held[-1][:] = host
        return self._held[-1].ctypes.data

    def get(self, address: int, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        """A copy of what lies at an address that put() gave, after all launched work."""
        for held in self._held:
            if self._gpu and held.data_ptr() == address:
                return held.cpu().numpy().view(dtype).reshape(shape)
            if not self._gpu and held.ctypes.data == address:
                return held.view(dtype).reshape(shape).copy()
        raise KeyError(address)

    def bytes(self, address: int, n: int) -> np.ndarray:
        """uint8 [n] of what lies there, as get()."""
        return self.get(address, np.uint8, (n,))

    def fresh(self) -> Device:
        """This device, holding nothing."""
        self._held = []
        return self

    def state(self, *, tokens: list[int] = (), positions: list[int] = (), out_rows: list[int] = ()) -> int:
        """Address of a kv_state of len(tokens or positions) rows."""
        state = ffi.new("kv_state *")
        state.n_rows, state.n_out, state.n_seqs = len(tokens or positions), len(out_rows), 1
        for name, values in {"token": tokens, "pos": positions, "out_row": out_rows}.items():
            setattr(state, name, ffi.cast("int32_t *", self.put(np.array(values or [0], np.int32))))
        return self.put(bytes(ffi.buffer(state)))

    def step(self, ops: list[tuple[str, dict]], state: int, *, max_rows: int, max_out: int = 0) -> int:
        """Runs ops, none of which needs scratch, given as (kind, fields); an address stands for a pointer. Returns the kv_status."""
        array = ffi.new("kv_op[]", len(ops))
        for (kind, fields), op in zip(ops, array, strict=True):
            op.kind, op.layer = getattr(self.lib, f"KV_OP_{kind.upper()}"), -1
            struct = getattr(op, kind)
            types = dict(ffi.typeof(struct).fields)
            for name, value in fields.items():
                if types[name].type.kind == "pointer":
                    value = ffi.cast(types[name].type, value)
                elif isinstance(value, dict):
                    value = {**value, "data": ffi.cast("void *", value["data"])}
                setattr(struct, name, value)
        bounds = ffi.new("kv_cuda_bounds *", {"max_rows": max_rows, "max_out": max_out, "max_seqs": 1})
        scratch = ffi.cast("void *", self.put(np.zeros(256, np.uint8)))
        status = self.lib.kv_cuda_step(array, len(ops), bounds, ffi.cast("kv_state *", state), scratch, 0)
        print(self.error())                                      # for a test that fails
        return status

    def error(self) -> str:
        """What kv_cuda_error says."""
        return ffi.string(self.lib.kv_cuda_error()).decode()

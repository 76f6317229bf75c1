"""The CUDA kernels behind the interface of tests/kernels/plans.py, so that the CPU kernels' tests run on them too: what the tests
have in numpy arrays goes to the device's memory for each step, and back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvrun.backends._abi import ffi

from ..kernels.plans import GIVEN, Step


class Mirror:
    """Device copies of host arrays, each made when first asked for."""

    def __init__(self, put: Callable[[np.ndarray], int], get: Callable[[int, int], np.ndarray]) -> None:
        """put: uint8 [n] -> address of a copy, a multiple of 256. get: (address, n) -> uint8 [n]."""
        self._put, self._get = put, get
        self._held: dict[int, tuple[int, np.ndarray]] = {}

    def address(self, host: np.ndarray) -> int:
        """Of the copy of `host`, a contiguous array."""
        at = host.ctypes.data
        if at not in self._held or self._held[at][1].size < host.nbytes:
            flat = host.reshape(-1).view(np.uint8)
            self._held[at] = self._put(flat), flat
        return self._held[at][0]

    def translate(self, struct: object) -> None:
        """Makes the pointers of a C struct, which plans.pointer() gave, those of the copies."""
        kind = ffi.typeof(struct)
        if "kv_weight" in kind.cname:
            from kvrun.backends.native import lib

            n_bytes = lib.kv_pack_bytes(struct.dtype, struct.n, struct.k)
            struct.data = ffi.cast("void *", self.address(np.frombuffer(ffi.buffer(struct.data, n_bytes), np.uint8)))
            return
        for name, field in kind.fields:
            value = getattr(struct, name)
            if field.type.kind in ("struct", "union"):
                self.translate(value)
            elif field.type.kind == "pointer" and value:
                setattr(struct, name, ffi.cast(field.type, self.address(GIVEN[int(ffi.cast("uintptr_t", value))])))

    def structs(self, array: object) -> int:
        """Address of a copy of an array of C structs, translated."""
        for struct in array:
            self.translate(struct)
        return self.address(np.frombuffer(ffi.buffer(array), np.uint8))

    def back(self) -> None:
        """Brings back what the device may have changed."""
        for address, flat in self._held.values():
            if flat.size and flat.flags.writeable:
                flat[:] = self._get(address, flat.size)


class CudaMachine:
    """A library with kv_cuda_step and memory that its kernels see. Scratch is what kv_cuda_scratch says, poisoned, with a guard
    behind it.

    Plans are launched for more rows, outputs, pages and sequences than the step has, now and then.
    """

    isa = "cuda"

    def __init__(self, lib: object, rng: np.random.Generator, mirror: Callable[[], Mirror]) -> None:
        """mirror: a new one for each step."""
        self.lib, self._rng, self._mirror = lib, rng, mirror
        self.appended = 0

    def run(self, ops: list[tuple[str, dict]], *, prefill=False, sampler=None, status: int = 0, **given) -> list[int]:
        """As Machine.run."""
        step = Step(ops, **given)
        more = self._rng.integers(0, 2, 4).tolist()
        bounds = ffi.new("kv_cuda_bounds *", {"max_rows": step.rows + more[0], "max_out": step.out + more[1], "max_pages": step.max_pages + more[2],
                                              "max_seqs": step.n_seqs + more[3] * (step.n_seqs > 1), "prefill": prefill})
        size = self.lib.kv_cuda_scratch(step.plan, len(ops), bounds)
        assert size > 0 and size % 256 == 0, ffi.string(self.lib.kv_cuda_error())
        room = np.full(size + 256, 0xFF, dtype=np.uint8)
        mirror = self._mirror()
        for op, (kind, _) in zip(step.plan, ops, strict=True):
            mirror.translate(getattr(op, kind))
        there = {name: ffi.cast("int32_t *", mirror.address(ids)) for name, ids in step.ids.items()}
        state = ffi.new("kv_state[1]", [{**step.counts, "prefill": prefill, "appended": self.appended, **there,
                                         "table": ffi.cast("kv_table *", mirror.structs(step.tables)),
                                         "sampler": ffi.cast("kv_sampler *", self._samplers(mirror, sampler, step.out))}])
        at = mirror.address(np.frombuffer(ffi.buffer(state), np.uint8))
        got = self.lib.kv_cuda_step(step.plan, len(ops), bounds, ffi.cast("kv_state *", at), ffi.cast("void *", mirror.address(room)), 0)
        assert got == 0, ffi.string(self.lib.kv_cuda_error())
        mirror.back()
        assert (room[size:] == 0xFF).all(), "wrote past its scratch"
        assert state[0].status == status
        self.appended = state[0].appended
        return step.next()

    @staticmethod
    def _samplers(mirror: Mirror, given: object, n: int) -> int:
        """Address of copies of n samplers and of the ids that they penalize; 0 without any."""
        if given is None:
            return 0
        samplers = ffi.new("kv_sampler[]", max(n, 1))
        for copy, sampler in zip(samplers, given, strict=False):
            ffi.memmove(ffi.addressof(copy), ffi.addressof(sampler), ffi.sizeof("kv_sampler"))
            ids = np.array(list(sampler.recent[0 : sampler.n_recent]) if sampler.n_recent else [0], np.int32)
            copy.recent = ffi.cast("int32_t *", mirror.address(ids))
        return mirror.address(np.frombuffer(ffi.buffer(samplers), np.uint8))

"""The CUDA kernels behind the interface of tests/kernels/plans.py, so that the CPU kernels' tests run on them too: on the
emulator, and on a GPU whose kernels may follow the host's pointers."""

from __future__ import annotations

import numpy as np

from kvrun.backends._abi import ffi

from ..kernels.plans import pointer


class CudaMachine:
    """A library with kv_cuda_step over host memory. Scratch is what kv_cuda_scratch says, poisoned, with a guard behind it.

    prefill plans and decode plans are launched for more rows, outputs, pages and sequences than the step has, now and then.
    """

    isa = "cuda"

    def __init__(self, lib: object, rng: np.random.Generator, wait: object = None) -> None:
        """wait: called after each step (a GPU's synchronize)."""
        self.lib, self._rng, self._wait = lib, rng, wait
        self.appended = 0

    def run(self, ops: list[tuple[str, dict]], *, pos, seq=None, tables=(), prefill=False, out_row=(), sampler=None, token=None,
            max_pages: int | None = None, status: int = 0) -> list[int]:
        """As Machine.run."""
        rows, out = len(pos), len(out_row)
        plan = ffi.new("kv_op[]", len(ops))
        for op, (kind, fields) in zip(plan, ops, strict=True):
            op.kind, op.layer = getattr(self.lib, f"KV_OP_{kind.upper()}"), -1
            setattr(op, kind, fields)
        keep = {name: np.ascontiguousarray(values, dtype=np.int32) for name, values in
                {"token": token if token is not None else [0] * rows, "pos": pos, "seq": seq if seq is not None else [0] * rows,
                 "out_row": list(out_row) or [0], "next": [-7] * max(out, 1)}.items()}
        n_seqs = len(tables[0]) if tables else int(keep["seq"].max()) + 1
        c_tables = ffi.new("kv_table[]", max(1, len(tables) * n_seqs))
        arrays = []
        for c_table, (pages, bases, *side) in zip(c_tables, (table for group in tables for table in group), strict=bool(tables)):
            arrays += [np.array(pages, dtype=np.int32), np.array(bases, dtype=np.int32)]
            c_table.page, c_table.base, c_table.n_pages = pointer(arrays[-2], "int32_t *"), pointer(arrays[-1], "int32_t *"), len(pages)
            c_table.side = side[0] if side else 0
        if max_pages is None:
            max_pages = max((len(table[0]) for group in tables for table in group), default=0)
        more = self._rng.integers(0, 2, 4).tolist()
        bounds = ffi.new("kv_cuda_bounds *", {"max_rows": rows + more[0], "max_out": out + more[1], "max_pages": max_pages + more[2],
                                              "max_seqs": n_seqs + more[3] * (n_seqs > 1), "prefill": prefill})
        state = ffi.new("kv_state *", {"n_rows": rows, "n_out": out, "n_seqs": n_seqs, "n_groups": len(tables), "prefill": prefill,
                                       "status": 0, "table": c_tables, "sampler": ffi.NULL if sampler is None else sampler,
                                       "appended": self.appended, **{n: pointer(a, "int32_t *") for n, a in keep.items()}})
        size = self.lib.kv_cuda_scratch(plan, len(plan), bounds)
        assert size > 0 and size % 256 == 0, ffi.string(self.lib.kv_cuda_error())
        room = np.full(size + 512, 0xFF, dtype=np.uint8)
        start = -room.ctypes.data % 256
        got = self.lib.kv_cuda_step(plan, len(plan), bounds, state, pointer(room[start:], "void *"), 0)
        assert got == 0, ffi.string(self.lib.kv_cuda_error())
        if self._wait:
            self._wait()
        assert (room[start + size :] == 0xFF).all(), "wrote past its scratch"
        assert state.status == status
        self.appended = state.appended
        return [int(i) for i in keep["next"][:out]]

"""The CPU executor: one foreign call a step, over memory that was taken at start."""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from kvrun.backends.batch import Batch, Sampler
from kvrun.backends.lower import lower, without_memory
from kvrun.backends.memory import Arena, aligned
from kvrun.backends.native import DTYPES, ISAS, ffi, lib
from kvrun.backends.plan import Buffer, CacheRef, Plan, Table, Vector, Weight
from kvrun.errors import KvrunError, NumericError, UsageError

if TYPE_CHECKING:
    from kvrun.weights.loaded import LoadedWeights


def default_threads() -> int:
    """Physical cores that this process may run on."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in allowed:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", encoding="ascii") as file:
                cores.add(file.read())
        except OSError:
            cores.add(cpu)
    return max(1, len(cores))


def best_isa() -> str:
    """The strongest instruction set that the build, the CPU and the kernel all grant."""
    return list(ISAS)[lib.kv_cpu_isa()]


def scratch_bytes(plan: Plan, *, max_pages: int, threads: int, isa: str, kv: tuple[str, str]) -> int:
    """Bytes of kernel scratch that any step of `plan` over a cache of formats `kv` needs. Needs no weights."""
    ops = lower(plan, lambda operand: without_memory(operand, kv))
    return lib.kv_cpu_scratch(ops, len(plan.ops), plan.max_rows, max_pages, threads, ISAS[isa])


def work_bytes(plan: Plan, *, max_pages: int, threads: int, kv: tuple[str, str], isa: str | None = None) -> int:
    """Bytes of a CpuExecutor's activations, logits and scratch, over a cache of formats `kv`."""
    scratch = scratch_bytes(plan, max_pages=max_pages, threads=threads, isa=isa or best_isa(), kv=kv)
    return sum(aligned(4 * b.dim * plan.buffer_rows(b)) for b in plan.buffers) + scratch


class CpuExecutor:
    """See kvrun.backends.executor.Executor. `weights` come from kvrun.weights.load."""

    name = "cpu"

    def __init__(self, plan: Plan, weights: Mapping[str, tuple[int, str]], vectors: Mapping[str, np.ndarray], pool,
                 *, threads: int | None = None, isa: str | None = None, owned: tuple[LoadedWeights, ...] = ()) -> None:
        """weights: Weight.name -> (address, format). vectors: Vector.name -> float32 [dim]. owned: weights that nobody
        else uses, given back by close()."""
        self.plan = plan
        self.threads = threads or default_threads()
        self.isa = isa or best_isa()
        if self.threads < 1 or self.threads > 1024:
            raise UsageError(f"--threads {self.threads}: must be from 1 to 1024")
        self._pool = pool
        self.kv: tuple[str, str] = pool.kv
        scratch = scratch_bytes(plan, max_pages=pool.max_pages, threads=self.threads, isa=self.isa, kv=pool.kv)
        offsets, end = {}, 0
        for buffer in plan.buffers:
            offsets[buffer.name] = end
            end += aligned(4 * buffer.dim * plan.buffer_rows(buffer))
        self._scratch_offset = end
        self._work = Arena(end + scratch, "activations")
        self._owned = (*owned, self._work)
        self._keep: list[object] = []
        tables = {op_value.name: np.array(op_value.values, dtype=np.float32)
                  for op in plan.ops for op_value in op.fields.values() if isinstance(op_value, Table)}

        def address(array_: np.ndarray) -> object:
            self._keep.append(array_)
            return ffi.cast("float *", ffi.from_buffer(array_))

        def resolve(operand: object) -> object:
            if isinstance(operand, Buffer):
                return ffi.cast("float *", self._work.address + offsets[operand.name])
            if isinstance(operand, Weight):
                where, dtype = weights[operand.name]
                return {"data": ffi.cast("void *", where), "dtype": DTYPES[dtype], "n": operand.n, "k": operand.k}
            if isinstance(operand, Vector):
                return address(vectors[operand.name])
            if isinstance(operand, Table):
                return address(tables[operand.name])
            if isinstance(operand, CacheRef):
                group = pool.groups[operand.group]
                base = group.memory.ctypes.data + operand.index * group.layer_stride
                side = ffi.NULL
                if group.side_stride:
                    side = ffi.cast("void *", group.side.ctypes.data + operand.index * group.side_stride)
                # kv_table.side is 0, the one sequence of the pool, so the stride between sequences is never used.
                return {"base": ffi.cast("void *", base), "page_stride": group.page_stride, "v_offset": group.v_offset,
                        "side": side, "side_stride": group.layout.side_bytes,
                        "k_dtype": DTYPES[group.k_dtype], "v_dtype": DTYPES[group.v_dtype], "group": operand.group}
            raise TypeError(f"no operand: {operand!r}")

        self._ops = lower(plan, resolve)
        logits_bytes = 4 * plan.logits.dim * plan.max_out
        start = offsets[plan.logits.name]
        self._logits = self._work.bytes[start : start + logits_bytes].view(np.float32).reshape(plan.max_out, plan.logits.dim)
        self._make_state(pool.max_pages)
        self._cpu = lib.kv_cpu_open(ISAS[self.isa], self.threads)
        if not self._cpu:
            raise KvrunError(f"cannot start {self.threads} threads of {self.isa} kernels; see 'kvrun doctor'")

    def _make_state(self, max_pages: int) -> None:
        """The state block and the arrays it points at, for one sequence, at their largest."""
        rows, out, n_groups = self.plan.max_rows, self.plan.max_out, len(self.plan.groups)
        self._state = state = ffi.new("kv_state *")
        self._arrays = {name: ffi.new("int32_t[]", size) for name, size in
                        {"token": rows, "pos": rows, "seq": rows, "out_row": out, "next": out}.items()}
        for name, values in self._arrays.items():
            setattr(state, name, values)
        self._tables = ffi.new("kv_table[]", n_groups)
        self._table_arrays = [(ffi.new("int32_t[]", max_pages), ffi.new("int32_t[]", max_pages)) for _ in range(n_groups)]
        for table, (pages, base) in zip(self._tables, self._table_arrays, strict=True):
            table.page, table.base = pages, base
        state.table, state.n_groups, state.n_seqs = self._tables, n_groups, 1
        self._samplers = ffi.new("kv_sampler[]", out)
        self._max_pages = max_pages

    @property
    def work_bytes(self) -> int:
        """Bytes of activations, logits and scratch."""
        return self._work.n_bytes

    @property
    def appended(self) -> int:
        """(row, layer) pairs whose K and V were computed since the start."""
        return self._state.appended

    def step(self, batch: Batch) -> list[int]:
        """See Executor.step. Raises ValueError for a batch larger than the plan."""
        if self._cpu is None:
            raise ValueError("the executor is closed")
        rows, out = len(batch.tokens), len(batch.out_rows)
        if not 0 < rows <= self.plan.max_rows or out > self.plan.max_out:
            raise ValueError(f"a step of {rows} rows and {out} outputs; the plan has {self.plan.max_rows} and {self.plan.max_out}")
        if not (0 <= min(batch.tokens) and max(batch.tokens) < self.plan.vocab_size):
            raise ValueError(f"a token id outside the vocabulary of {self.plan.vocab_size}")
        state, arrays = self._state, self._arrays
        arrays["token"][0:rows] = batch.tokens
        arrays["pos"][0:rows] = batch.positions
        arrays["seq"][0:rows] = batch.sequences or [0] * rows
        arrays["out_row"][0:out] = batch.out_rows
        state.n_rows, state.n_out, state.prefill = rows, out, batch.prefill
        for g, ((table,), (pages, base)) in enumerate(zip(batch.tables, self._table_arrays, strict=True)):
            n = len(table.pages)
            ffi.memmove(pages, table.pages if isinstance(table.pages, array) else array("i", table.pages), 4 * n)
            ffi.memmove(base, table.base if isinstance(table.base, array) else array("i", table.base), 4 * n)
            self._tables[g].n_pages = n
        recent = self._set_sampler(batch.sampler, batch.recent, out)
        status = lib.kv_cpu_step(self._cpu, self._ops, len(self.plan.ops), state, self._scratch)
        del recent
        if status == lib.KV_NOT_FINITE:
            raise NumericError(f"the model gave NaN or Inf at position {batch.positions[-1]}; its weights may be damaged: try 'kvrun verify'")
        if status != lib.KV_OK:
            raise KvrunError(f"the kernels refused the plan (status {status})")
        return list(arrays["next"][0:out]) if batch.sampler else []

    @property
    def _scratch(self) -> object:
        return ffi.cast("void *", self._work.address + self._scratch_offset)

    def _set_sampler(self, sampler: Sampler | None, recent: list[int], out: int) -> object:
        """Fills the samplers; returns what must stay alive during the step."""
        if sampler is None:
            self._state.sampler = ffi.NULL
            return None
        penalized = ffi.new("int32_t[]", recent) if sampler.repeat_penalty != 1.0 and recent else ffi.NULL
        for entry in self._samplers[0:out]:
            entry.seed = sampler.seed % 2**64
            entry.temperature, entry.top_p, entry.min_p = sampler.temperature, sampler.top_p, sampler.min_p
            entry.repeat_penalty, entry.top_k = sampler.repeat_penalty, sampler.top_k
            entry.recent, entry.n_recent = penalized, len(recent) if penalized else 0
        self._state.sampler = self._samplers
        return penalized

    def logits(self) -> np.ndarray:
        """float32 [len(out_rows)][vocab] of the last step; overwritten by the next."""
        return self._logits[: self._state.n_out]

    def profile(self) -> dict[str, float]:
        """Seconds per op kind since the last call."""
        ns = ffi.new("int64_t[]", lib.KV_OP_COUNT)
        lib.kv_cpu_profile(self._cpu, ns)
        kinds = [k.removeprefix("KV_OP_").lower() for _, k in sorted(ffi.typeof("enum kv_kind").elements.items())]
        return {kind: value / 1e9 for kind, value in zip(kinds, ns, strict=False) if value}

    def close(self) -> None:
        """Gives threads and memory back. Idempotent."""
        if self._cpu is None:
            return
        lib.kv_cpu_close(self._cpu)
        self._cpu = None
        self._logits = self._ops = None
        self._keep.clear()
        for memory in self._owned:
            memory.close()
        self._owned = ()
        self._pool.close()

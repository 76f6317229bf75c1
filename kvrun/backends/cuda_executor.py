"""The executor over kernels/cuda, on any Device: a GPU, or the emulator, which differ in memory, stream and replay alone.

A decode step is one replay of captured work. The next one is started before its token is asked for: the device itself moves
token and position on, so that it computes while the host looks at the token before. Where the host then goes another way,
that step was for nothing and did no harm: what it stored lies behind the newest token, and will be overwritten; the sums
over a 4-bit K page's rows are only changed when it is known to be wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvrun.backends import cuda_product
from kvrun.backends.batch import Batch, Sampler
from kvrun.backends.cuda_device import Device, check, copy
from kvrun.backends.cuda_state import StateBlock
from kvrun.backends.lower import lower, without_memory
from kvrun.backends.native import DTYPES, ffi, lib
from kvrun.backends.plan import Buffer, CacheRef, Plan, Table, Vector, Weight
from kvrun.cache.formats import PAGE
from kvrun.errors import KvrunError, NumericError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

_ALIGN = 256
_TURNS = 2          # the logits of a step are there until the step after the next


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGN) * _ALIGN


class WorkLayout:
    """Where everything but weights and cache lies in the executor's one allocation, in bytes."""

    def __init__(self, plan: Plan, cuda: Any, *, max_pages: int, kv: tuple[str, str]) -> None:
        """cuda: a library with kv_cuda_scratch. UsageError for a shape or format that it has no kernel for."""
        self.plan, self.max_pages = plan, max_pages
        self._end = 0
        self.buffers = {b.name: self._take(4 * b.dim * plan.buffer_rows(b)) for b in plan.buffers}
        logits_bytes = 4 * plan.logits.dim * plan.max_out
        self.logits = [self.buffers[plan.logits.name], *(self._take(logits_bytes) for _ in range(_TURNS - 1))]
        self.vectors = {v.name: self._take(4 * v.dim) for v in plan.vectors}
        self.tables = {t.name: self._take(4 * len(t.values)) for t in tables_of(plan)}
        self.state = self._take(StateBlock.n_bytes_of(plan, max_pages))
        ops = lower(plan, lambda operand: without_memory(operand, kv))
        needs = []
        for prefill in (True, False):
            bounds = bounds_of(plan.max_rows, plan.max_out, max_pages, prefill)
            needs.append(cuda.kv_cuda_scratch(ops, len(plan.ops), bounds))
            if needs[-1] < 0:
                raise UsageError(f"--device cuda: {ffi.string(cuda.kv_cuda_error()).decode()}; use --device cpu")
        self.scratch = self._take(max(needs))
        self.n_bytes = self._end

    def _take(self, n_bytes: int) -> int:
        at = self._end
        self._end += _aligned(n_bytes)
        return at


def tables_of(plan: Plan) -> list[Table]:
    """The plan's constants, each once."""
    found = {value.name: value for op in plan.ops for value in op.fields.values() if isinstance(value, Table)}
    return list(found.values())


def bounds_of(rows: int, out: int, pages: int, prefill: bool) -> Any:
    """kv_cuda_bounds of one sequence."""
    return ffi.new("kv_cuda_bounds *", {"max_rows": rows, "max_out": out, "max_pages": pages, "max_seqs": 1, "prefill": prefill})


def work_bytes(plan: Plan, cuda: Any, *, max_pages: int, kv: tuple[str, str], products: bool) -> int:
    """Bytes of activations, parameters, state and scratch. products: with those of torch's matrix products."""
    return WorkLayout(plan, cuda, max_pages=max_pages, kv=kv).n_bytes + (cuda_product.work_bytes(plan) if products else 0)


@dataclass
class _Run:
    """A step that the device has been given. tables: the page tables that it reads."""

    turn: int
    mark: Any
    position: int
    sampler: Sampler | None
    tables: list[tuple[bytes, bytes]]


class CudaExecutor:
    """See kvrun.backends.executor.Executor."""

    def __init__(self, plan: Plan, weights: Mapping[str, tuple[int, str]], vectors: Mapping[str, np.ndarray], pool, device: Device,
                 *, owned: tuple[object, ...] = ()) -> None:
        """weights: Weight.name -> (device address, format). vectors: Vector.name -> float32 [dim]. pool: its memory is the
        device's. owned: what nobody else uses, closed by close() in this order, last."""
        self.plan, self.name = plan, device.name
        self.kv: tuple[str, str] = pool.kv
        self._device, self._pool, self._lib = device, pool, device.lib
        self._layout = layout = WorkLayout(plan, device.lib, max_pages=pool.max_pages, kv=pool.kv)
        self._work = device.allocate(layout.n_bytes, "the activations")
        self._owned = owned
        self._put_constants(vectors)
        self._ops = [lower(plan, self._resolver(weights, turn)) for turn in range(_TURNS)]
        self._block = StateBlock(plan, pool.max_pages, device.pinned(StateBlock.n_bytes_of(plan, pool.max_pages)), self._work.address + layout.state)
        self._state = ffi.cast("kv_state *", self._block.address)
        self._scratch = ffi.cast("void *", self._work.address + layout.scratch)
        self._results = [device.pinned(self._block.result_bytes) for _ in range(_TURNS)]
        self._product = device.product()
        self._replays: dict[tuple[int, int], Callable[[], None]] = {}
        self._tried: set[tuple[int, int]] = set()
        self._ahead: _Run | None = None
        self._turn, self._n_out, self._token = 0, 0, -1
        self.runs_ahead = True
        """Whether a step starts the one after it. Off where executors on one device are timed in turns."""
        self.appended = 0
        """See Executor. What ran ahead for nothing is not counted."""

    # ---- memory ----

    def _put_constants(self, vectors: Mapping[str, np.ndarray]) -> None:
        data = {self._layout.vectors[v.name]: np.ascontiguousarray(vectors[v.name], np.float32) for v in self.plan.vectors}
        data |= {self._layout.tables[t.name]: np.array(t.values, np.float32) for t in tables_of(self.plan)}
        for offset, values in data.items():
            self._device.fill(self._work, offset, values.view(np.uint8))

    def _resolver(self, weights: Mapping[str, tuple[int, str]], turn: int) -> Callable[[object], object]:
        base, layout = self._work.address, self._layout

        def resolve(operand: object) -> object:
            if isinstance(operand, Buffer):
                at = layout.logits[turn] if operand == self.plan.logits else layout.buffers[operand.name]
                return ffi.cast("float *", base + at)
            if isinstance(operand, Weight):
                where, dtype = weights[operand.name]
                return {"data": ffi.cast("void *", where), "dtype": DTYPES[dtype], "n": operand.n, "k": operand.k}
            if isinstance(operand, Vector):
                return ffi.cast("float *", base + layout.vectors[operand.name])
            if isinstance(operand, Table):
                return ffi.cast("float *", base + layout.tables[operand.name])
            if isinstance(operand, CacheRef):
                group = self._pool.groups[operand.group]
                side = ffi.NULL
                if group.side_stride:
                    side = ffi.cast("void *", group.side_address + operand.index * group.side_stride)
                return {"base": ffi.cast("void *", group.address + operand.index * group.layer_stride), "page_stride": group.page_stride,
                        "v_offset": group.v_offset, "side": side, "side_stride": group.layout.side_bytes,
                        "k_dtype": DTYPES[group.k_dtype], "v_dtype": DTYPES[group.v_dtype], "group": operand.group}
            raise TypeError(f"no operand: {operand!r}")

        return resolve

    # ---- steps ----

    def step(self, batch: Batch) -> list[int]:
        """See Executor.step. Raises ValueError for a batch larger than the plan."""
        if self._device is None:
            raise ValueError("the executor is closed")
        rows, out = len(batch.tokens), len(batch.out_rows)
        if not 0 < rows <= self.plan.max_rows or out > self.plan.max_out:
            raise ValueError(f"a step of {rows} rows and {out} outputs; the plan has {self.plan.max_rows} and {self.plan.max_out}")
        if not (0 <= min(batch.tokens) and max(batch.tokens) < self.plan.vocab_size):
            raise ValueError(f"a token id outside the vocabulary of {self.plan.vocab_size}")
        try:
            ran_ahead = self._ahead is not None and self._is_what_ran_ahead(batch)
            run = self._ahead if ran_ahead else self._start(batch)
            self._ahead = None
            if self._may_run_ahead(batch):
                self._ahead = self._run_on(run)
            elif ran_ahead:
                self._settle(run)
            return self._finish(run, batch)
        except KeyboardInterrupt:                # the next step may not write what a copy still reads
            self._ahead = None
            self._device.wait(self._device.mark())
            raise

    def _is_what_ran_ahead(self, batch: Batch) -> bool:
        ahead = self._ahead
        return (_is_plain_decode(batch) and batch.tokens[0] == self._token and batch.positions[0] == ahead.position
                and batch.sampler == ahead.sampler and _tables(batch) == ahead.tables)

    def _may_run_ahead(self, batch: Batch) -> bool:
        """Whether the step after this one needs nothing of the host."""
        following = batch.positions[-1] + 1
        return (self.runs_ahead and _is_plain_decode(batch) and batch.sampler.repeat_penalty == 1.0
                and all(table.base and table.base[-1] <= following < table.base[-1] + PAGE for (table,) in batch.tables))

    def _start(self, batch: Batch) -> _Run:
        """Gives the device the state of a step and the step."""
        block = self._block
        block.write(batch, self.appended)
        copy(self._device, block.address, block.state_address, block.used)
        pages = max(len(table.pages) for (table,) in batch.tables)
        run = _Run(1 - self._turn, None, batch.positions[-1], batch.sampler, _tables(batch))
        if len(batch.tokens) == 1 and len(batch.out_rows) <= 1 and not batch.prefill:
            self._decode(run.turn, pages)
        else:
            self._many_rows(batch, run.turn, pages)
            self._fetch(run.turn)
        run.mark = self._device.mark()
        return run

    def _run_on(self, run: _Run) -> _Run:
        """Gives the device the step after `run`, whose token it knows itself."""
        check(self._lib, self._lib.kv_cuda_advance(self._state, self._device.stream))
        following = _Run(1 - run.turn, None, run.position + 1, run.sampler, run.tables)
        self._decode(following.turn, max(len(pages) // 4 for pages, _ in run.tables))
        following.mark = self._device.mark()
        return following

    def _settle(self, run: _Run) -> None:
        """Says that `run`, which ran ahead and which none runs ahead of, was wanted."""
        if self.kv[0] == "q4":
            check(self._lib, self._lib.kv_cuda_settle(self._ops[run.turn], len(self.plan.ops), bounds_of(1, 1, 1, False), self._state, self._scratch,
                                                      self._device.stream))

    def _decode(self, turn: int, pages: int) -> None:
        """One row, from the state on the device; captured once for each power of two of pages. The first run of all
        kernels is never captured: it loads them."""
        bound = 1
        while bound < pages:
            bound *= 2
        bound = min(bound, self._pool.max_pages)
        key = (turn, bound)

        def work() -> None:
            self._launch(self._ops[turn], 0, len(self.plan.ops), bounds_of(1, 1, bound, False))
            self._fetch(turn)

        if key in self._tried and key not in self._replays:
            self._replays[key] = self._device.captured(work)
        self._tried.add(key)
        self._replays.get(key, work)()

    def _many_rows(self, batch: Batch, turn: int, pages: int) -> None:
        """Any rows; products of many of them by the device's library."""
        ops, rows, out = self._ops[turn], len(batch.tokens), len(batch.out_rows)
        bounds = bounds_of(rows, out, pages, batch.prefill)
        start = 0
        if self._product is not None and batch.prefill:
            for i, op in enumerate(self.plan.ops):
                of_op = out if op.kind == "linear" and op.fields["rows"] == lib.KV_ROWS_OUT else rows
                if op.kind == "linear" and of_op >= cuda_product.MIN_ROWS:
                    self._launch(ops, start, i, bounds)
                    self._multiply(ops[i].linear, op.fields, turn, of_op)
                    start = i + 1
        self._launch(ops, start, len(self.plan.ops), bounds)

    def _multiply(self, op: Any, fields: dict[str, Any], turn: int, rows: int) -> None:
        x, out = (self._floats(fields[name], turn, rows) for name in ("x", "out"))
        bias = fields["bias"]
        if bias is not None:
            bias = self._work.floats(self._layout.vectors[bias.name], bias.dim)
        self._product(op.w, x, out, bias, scale=op.scale, softcap=op.softcap, accumulate=bool(op.accumulate))

    def _floats(self, buffer: Buffer, turn: int, rows: int) -> Any:
        at = self._layout.logits[turn] if buffer == self.plan.logits else self._layout.buffers[buffer.name]
        return self._work.floats(at, rows, buffer.dim)

    def _launch(self, ops: Any, start: int, stop: int, bounds: object) -> None:
        if start < stop:
            check(self._lib, self._lib.kv_cuda_step(ops + start, stop - start, bounds, self._state, self._scratch, self._device.stream))

    def _fetch(self, turn: int) -> None:
        copy(self._device, self._results[turn].ctypes.data, self._block.address, self._block.result_bytes)

    def _finish(self, run: _Run, batch: Batch) -> list[int]:
        """Waits for a step; what it drew."""
        self._device.wait(run.mark)
        result = self._results[run.turn]
        state = ffi.cast("kv_state *", result.ctypes.data)
        self._turn, self._n_out, self.appended = run.turn, len(batch.out_rows), state.appended
        if state.status == lib.KV_NOT_FINITE:
            self._drop_ahead()
            raise NumericError(f"the model gave NaN or Inf at position {batch.positions[-1]}; its weights may be damaged: try 'kvrun verify'")
        if state.status != lib.KV_OK:
            self._drop_ahead()
            raise KvrunError(f"the kernels refused the state (status {state.status})")
        if batch.sampler is None:
            return []
        at = self._block.result_bytes - 4 * self.plan.max_out
        drawn = result[at : at + 4 * self._n_out].view(np.int32).tolist()
        self._token = drawn[-1] if drawn else -1
        return drawn

    def _drop_ahead(self) -> None:
        """Waits for what ran ahead, of which nothing is wanted."""
        if self._ahead is not None:
            self._device.wait(self._ahead.mark)
            self._ahead = None

    def logits(self) -> np.ndarray:
        """float32 [len(out_rows)][vocab] of the last step; a copy."""
        out = np.empty((self._n_out, self.plan.logits.dim), np.float32)
        if out.size:
            copy(self._device, out.ctypes.data, self._work.address + self._layout.logits[self._turn], out.nbytes)
            self._device.wait(self._device.mark())
        return out

    @property
    def work_bytes(self) -> int:
        """Bytes of activations, parameters, state and scratch."""
        return self._layout.n_bytes

    def close(self) -> None:
        """Gives all memory back. Idempotent."""
        if self._device is None:
            return
        self._drop_ahead()
        self._device.wait(self._device.mark())
        self._replays.clear()
        for memory in (self._work, self._pool, *self._owned):
            memory.close()
        self._device = self._owned = self._ops = None


def _is_plain_decode(batch: Batch) -> bool:
    return not batch.prefill and len(batch.tokens) == 1 and batch.out_rows == [0] and batch.sampler is not None


def _tables(batch: Batch) -> list[tuple[bytes, bytes]]:
    return [(np.asarray(table.pages, np.int32).tobytes(), np.asarray(table.base, np.int32).tobytes()) for (table,) in batch.tables]

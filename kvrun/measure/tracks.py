"""One model's weights and several caches over them, each with an executor of its own: what comparisons are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Items
from typing import TYPE_CHECKING, Self

import numpy as np

from kvrun.backends.batch import Batch, Sampler
from kvrun.backends.memory import Arena
from kvrun.cache.planner import MemoryPlan, check_fits
from kvrun.cache.pool import Pool
from kvrun.errors import UsageError

if TYPE_CHECKING:
    from kvrun.backends.cuda_device import Device
    from kvrun.backends.executor import Executor
    from kvrun.blueprint import Blueprint
    from kvrun.weights.loaded import LoadedWeights
    from kvrun.weights.on_device import DeviceWeights

Report = Callable[[int, int], None]


class Track:
    """An executor with a cache of one format. The cache holds `length` tokens."""

    def __init__(self, kv: str, executor: Executor, pool: Pool) -> None:
        self.kv = kv
        self.executor = executor
        self.pool = pool
        self._sequence = pool.sequence()
        self._ids: list[int] = []

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._sequence.length

    def prefill(self, ids: Items[int], out: bool = False) -> None:
        """Appends prompt tokens, in steps of at most the plan's rows. out: every row gives logits, at most max_out."""
        size = self.executor.plan.max_out if out else self.executor.plan.max_rows
        start = 0
        while start < len(ids):
            part = list(ids[start : start + self.most_rows(size)])
            self._step(part, prefill=True, out_rows=list(range(len(part))) if out else [])
            start += len(part)

    def most_rows(self, wanted: int) -> int:
        """How many of the next `wanted` rows one step takes: a page that is quantized whole ends a step."""
        return self._sequence.most_rows(wanted)

    def decode(self, token: int) -> int:
        """Appends one token as an answer's, and draws the next, greedily."""
        return self._step([token], prefill=False, out_rows=[0])[0]

    def predict(self, ids: Items[int]) -> int:
        """Reads `ids` from nothing and draws the next token: what decoding costs without a cache."""
        self.rewind(0)
        self.prefill(ids[:-1])
        return self._step([ids[-1]], prefill=True, out_rows=[0])[0]

    def logits(self) -> np.ndarray:
        """float32 [rows][vocab] of the last step that gave any; overwritten by the next."""
        return np.asarray(self.executor.logits())

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens; of a sliding group at most Model.rewinds back."""
        if not self._sequence.truncate(length):
            raise ValueError(f"the window has moved on from token {length}")
        again = self._ids[self.length : length]  # a format that quantizes whole pages goes back to a page border
        del self._ids[self.length :]
        self.prefill(again)

    def _step(self, part: list[int], *, prefill: bool, out_rows: list[int]) -> list[int]:
        first = self._sequence.length
        self._sequence.extend(len(part))
        self._ids += part
        draw = bool(out_rows) and (not prefill or len(out_rows) == 1)
        return self.executor.step(Batch(
            tokens=part, positions=list(range(first, first + len(part))), tables=[[t] for t in self._sequence.tables()],
            prefill=prefill, out_rows=out_rows, sampler=Sampler() if draw else None))

    def close(self) -> None:
        """Gives the executor's threads and the cache's memory back."""
        self.executor.close()


class Model:
    """Weights in memory once, and any number of tracks of n_ctx tokens over them."""

    def __init__(self, blueprint: Blueprint, n_ctx: int, kvs: Items[str], *, random: bool = False, rewinds: int = 0,
                 report: Report | None = None) -> None:
        """kvs: the format of each track. random: weights of the model's shape in place of its own. rewinds: tokens that
        every track can go back by, also where a window has moved on. report: told of the values loaded. Checks that all
        of it fits before anything is read. Errors: OutOfMemoryError, ModelError, UsageError."""
        for kv in kvs:
            blueprint.formats(kv)
        self.blueprint = blueprint
        self.n_ctx = n_ctx
        self.plan = blueprint.plan(n_ctx)
        check_fits(lambda n: self._memory(kvs, n), n_ctx, blueprint.available(),
                   advise=lambda n: f"{n} tokens of context would fit: less of them, or fewer formats at once")
        self.rewinds = rewinds
        self.weights: LoadedWeights | DeviceWeights | None = None  # of native executors; the reference shares its own
        self.device: Device | None = None
        self.tracks: list[Track] = []
        random = random or blueprint.source is None
        if blueprint.shape.device in ("cuda", "simt"):
            from kvrun.backends.cuda import open_device
            from kvrun.weights.on_device import DeviceWeights

            self.device = open_device(blueprint.shape.device)
            if random:
                self.weights = DeviceWeights.random(blueprint.packed, self.plan, self.device, progress=report)
            else:
                self.weights = DeviceWeights.read(blueprint.packed, self.plan, blueprint.source, blueprint.refs, blueprint.threads,
                                                  self.device, report)
        elif blueprint.shape.device != "reference":
            from kvrun.weights.loaded import LoadedWeights

            if random:
                self.weights = LoadedWeights.random(blueprint.packed, self.plan, progress=report)
            else:
                self.weights = LoadedWeights.read(blueprint.packed, self.plan, blueprint.source, blueprint.refs, blueprint.threads, report)
        elif random:
            raise UsageError("random weights need the native kernels; use --device cpu")
        try:
            for kv in kvs:
                self.tracks.append(self._open(kv, alone=len(kvs) == 1))
        except BaseException:
            self.close()
            raise

    def _memory(self, kvs: Items[str], n_ctx: int) -> MemoryPlan:
        plans = [self.blueprint.memory(kv, n_ctx) for kv in kvs]
        return MemoryPlan(n_ctx, self.blueprint.weight_bytes, sum(p.cache for p in plans), sum(p.workspace for p in plans),
                          self.blueprint.program_bytes)

    def _open(self, kv: str, alone: bool) -> Track:
        allocate = Arena if self.device is None else self.device.allocate
        pool = Pool(self.plan.groups, n_ctx=self.n_ctx, chunk=self.plan.max_rows + self.rewinds, kv=self.blueprint.formats(kv), allocate=allocate)
        try:
            if self.device is not None:
                from kvrun.backends.cuda_executor import CudaExecutor

                executor = CudaExecutor(self.plan, self.weights.matrices, self.weights.vectors, pool, self.device)
                executor.runs_ahead = alone  # else one track's step would still run while the next one is timed
                return Track(kv, executor, pool)
            if self.weights is None:
                from kvrun.backends.reference import ReferenceExecutor

                like = self.tracks[0].executor if self.tracks else None
                return Track(kv, ReferenceExecutor(self.plan, self.blueprint.source, self.blueprint.refs, pool, like=like), pool)
            from kvrun.backends.cpu import CpuExecutor

            return Track(kv, CpuExecutor(self.plan, self.weights.matrices, self.weights.vectors, pool, threads=self.blueprint.threads), pool)
        except BaseException:
            pool.close()
            raise

    def close(self) -> None:
        """Gives all memory back. Idempotent."""
        for track in self.tracks:
            track.close()
        self.tracks = []
        if self.weights is not None:
            self.weights.close()
            self.weights = None
        if self.device is not None:
            self.device.close()
            self.device = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

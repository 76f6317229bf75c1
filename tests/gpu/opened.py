"""A model of random weights on a device, and caches over it that are as deep as asked for without being computed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from kvrun.backends import simt
from kvrun.backends.batch import Batch, Sampler
from kvrun.backends.cuda import open_device
from kvrun.backends.cuda_device import Device, copy
from kvrun.backends.cuda_executor import CudaExecutor
from kvrun.blueprint import Blueprint, Shape
from kvrun.cache.formats import PAGE
from kvrun.cache.pool import Pool
from kvrun.hub import resolve
from kvrun.weights.load import layout_as
from kvrun.weights.on_device import DeviceWeights

if "KVRUN_SIMT_LIBRARY" in os.environ:
    simt.LIBRARY = Path(os.environ["KVRUN_SIMT_LIBRARY"])


class Opened:
    """Weights of one shape and format."""

    def __init__(self, folder: Path, weights: str, n_ctx: int, chunk: int, device: str = "cuda") -> None:
        """weights: one of load.WEIGHTS, or "q4s": what is q4 otherwise, as a Q4_0 file has it."""
        of_file = weights == "q4s"
        self.blueprint = Blueprint(resolve(str(folder), weights=False), Shape(device, None, 1, chunk, "q4" if of_file else weights))
        self.plan = self.blueprint.plan(n_ctx)
        if of_file:
            dtypes = {p.weight: p.dtype for p in self.blueprint.packed}
            self.blueprint.packed = layout_as(self.plan, lambda weight: "q4s" if dtypes[weight] == "q4" else dtypes[weight])
        self.n_ctx = n_ctx
        self.device = simt.SimtDevice(products=True) if device == "simt" else open_device(device)
        self.weights = DeviceWeights.random(self.blueprint.packed, self.plan, self.device)

    def track(self, kv: str) -> Track:
        """A cache of n_ctx tokens."""
        pool = Pool(self.plan.groups, n_ctx=self.n_ctx, chunk=self.plan.max_rows, kv=self.blueprint.formats(kv), allocate=self.device.allocate)
        return Track(CudaExecutor(self.plan, self.weights.matrices, self.weights.vectors, pool, self.device), pool, self.device)

    def close(self) -> None:
        """Gives all memory back."""
        self.weights.close()
        self.device.close()
        self.blueprint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Track:
    """An executor over one cache."""

    def __init__(self, executor: CudaExecutor, pool: Pool, device: Device) -> None:
        self.executor, self.pool, self._device = executor, pool, device
        self.sequence = pool.sequence()
        self._token = 1

    def fill(self) -> None:
        """Computes a chunk of prompt rows and copies its pages over all others, so that no cache that is read holds zeros:
        those would cost less power, and so less time, than numbers do."""
        self.jump(0)
        self.prefill(self.executor.plan.max_rows)
        for group, table in zip(self.pool.groups, self.sequence.tables(), strict=True):
            full = self.sequence.length // PAGE
            assert list(table.pages[:full]) == list(range(full)), "a fresh pool gives its pages in order"
            have, whole = full * group.page_stride, group.layout.page_bytes
            while 0 < have < whole:
                n = min(have, whole - have)
                copy(self._device, group.address + have, group.address, n)
                have += n

    def jump(self, depth: int) -> None:
        """Makes the cache hold `depth` tokens, of which nothing is computed."""
        self.sequence.clear()
        while self.sequence.length < depth:
            self.sequence.extend(self.sequence.most_rows(depth - self.sequence.length))

    def prefill(self, n: int) -> None:
        """Computes n prompt rows, the last of which gives a token."""
        chunk = self.executor.plan.max_rows
        while n:
            rows = self.sequence.most_rows(min(chunk, n))
            n -= rows
            self._step([i % 1000 for i in range(rows)], prefill=True, out=n == 0)

    def decode(self) -> int:
        """One token, drawn greedily."""
        self._token = self._step([self._token], prefill=False, out=True)[0]
        return self._token

    def _step(self, tokens: list[int], *, prefill: bool, out: bool) -> list[int]:
        first = self.sequence.length
        self.sequence.extend(len(tokens))
        return self.executor.step(Batch(tokens, list(range(first, first + len(tokens))), [[t] for t in self.sequence.tables()], prefill,
                                        out_rows=[len(tokens) - 1] if out else [], sampler=Sampler() if out else None))

    def close(self) -> None:
        """Gives the cache back."""
        self.executor.close()

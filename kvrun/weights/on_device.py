"""A model's packed weights in a device's memory. They pass through the host one matrix at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Self

import numpy as np

from kvrun.backends.cuda_device import Device, Memory, copy
from kvrun.backends.memory import Arena
from kvrun.backends.native import DTYPES, lib
from kvrun.backends.plan import Plan
from kvrun.models.spec import TensorRef
from kvrun.weights import load
from kvrun.weights.load import PackedWeight, Progress
from kvrun.weights.loaded import LoadedWeights
from kvrun.weights.source import TensorSource

_REPEATED_BYTES = 1 << 20
"""Of a random matrix, how much is drawn."""


class DeviceWeights:
    """matrices: Weight.name -> (device address, format). vectors: Vector.name -> float32 [dim], still on the host."""

    def __init__(self, packed: list[PackedWeight], memory: Memory, vectors: dict[str, np.ndarray]) -> None:
        self._memory = memory
        self.matrices = {p.weight.name: (memory.address + p.offset, p.dtype) for p in packed}
        self.vectors = vectors

    @property
    def n_bytes(self) -> int:
        """Bytes of all of them: what a Blueprint announces as weight_bytes."""
        return self._memory.n_bytes + sum(v.nbytes for v in self.vectors.values())

    @classmethod
    def read(cls, packed: list[PackedWeight], plan: Plan, source: TensorSource, refs: Mapping[str, TensorRef], threads: int,
             device: Device, progress: Progress | None = None) -> Self:
        """Reads, packs and copies a model's weights."""
        memory = device.allocate(load.weight_bytes(packed), "the weights")
        done, total = 0, sum(p.weight.n * p.weight.k for p in packed)
        try:
            for item in packed:
                def report(values: int, _: int, before: int = done) -> None:
                    if progress:
                        progress(before + values, total)

                staging = Arena(item.n_bytes, f"reading {item.weight.name}")
                load.pack([replace(item, offset=0)], staging, source, refs, threads, report)
                device.fill(memory, item.offset, staging.bytes[: item.n_bytes])
                staging.close()
                done += item.weight.n * item.weight.k
            return cls(packed, memory, {v.name: load.read_vector(v, source, refs) for v in plan.vectors})
        except BaseException:
            memory.close()
            raise

    @classmethod
    def random(cls, packed: list[PackedWeight], plan: Plan, device: Device, seed: int = 0, progress: Progress | None = None) -> Self:
        """As LoadedWeights.random. A few rows of a matrix are made on the host; the device repeats them."""
        memory = device.allocate(load.weight_bytes(packed), "the weights")
        done, total = 0, sum(p.n_bytes for p in packed)
        vectors: dict[str, np.ndarray] = {}
        for item in packed:
            block = lib.kv_pack_bytes(DTYPES[item.dtype], lib.KV_LANES, item.weight.k)
            rows = min(item.n_bytes, -(-_REPEATED_BYTES // block) * block) // block * lib.KV_LANES
            few = replace(item.weight, n=min(rows, item.weight.n))
            have = lib.kv_pack_bytes(DTYPES[item.dtype], few.n, few.k)
            one = LoadedWeights.random([PackedWeight(few, item.dtype, 0, have)], plan, seed)
            device.fill(memory, item.offset, one.packed_bytes[:have])
            while have < item.n_bytes:
                n = min(have, item.n_bytes - have)
                copy(device, memory.address + item.offset + have, memory.address + item.offset, n)
                have += n
            vectors = one.vectors
            one.close()
            done += item.n_bytes
            if progress:
                progress(done, total)
        return cls(packed, memory, vectors)

    def close(self) -> None:
        """Gives the memory back. Idempotent; executors that read it must be closed before."""
        self._memory.close()
        self.matrices, self.vectors = {}, {}

"""A model's weights in memory, packed for the native executors. Any number of executors may share them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import numpy as np

from kvrun.backends.memory import Arena
from kvrun.backends.native import DTYPES, ffi, lib
from kvrun.backends.plan import Plan
from kvrun.errors import ModelError
from kvrun.models.spec import TensorRef
from kvrun.weights import load
from kvrun.weights.kept import KeptWeights
from kvrun.weights.load import PackedWeight, Progress
from kvrun.weights.source import TensorSource

_TILE_VALUES = 1 << 20
"""Random values drawn for a matrix; a larger one repeats them."""


class LoadedWeights:
    """matrices: Weight.name -> (address, format). vectors: Vector.name -> float32 [dim]."""

    def __init__(self, packed: list[PackedWeight], arena: Arena, vectors: dict[str, np.ndarray]) -> None:
        self._arena = arena
        self.matrices = {p.weight.name: (arena.address + p.offset, p.dtype) for p in packed}
        self.vectors = vectors

    @property
    def n_bytes(self) -> int:
        """Bytes of all of them: what a Blueprint announces as weight_bytes."""
        return self._arena.n_bytes + sum(v.nbytes for v in self.vectors.values())

    @property
    def packed_bytes(self) -> np.ndarray:
        """uint8: all matrices as they lie, a view."""
        return self._arena.bytes

    @classmethod
    def read(cls, packed: list[PackedWeight], plan: Plan, source: TensorSource, refs: Mapping[str, TensorRef],
             threads: int, progress: Progress | None = None, notify: Callable[[str], None] | None = None) -> Self:
        """Reads and packs a model's weights, `threads` slices at a time. What is quantized here is kept on disk and read
        from there the next time; notify: told where that cannot be."""
        arena = Arena(load.weight_bytes(packed), "the weights")
        kept = KeptWeights.of(packed, source, refs)
        if kept is None or not kept.read(arena, threads, progress):
            load.pack(packed, arena, source, refs, threads, progress)
            problem = kept.write(arena) if kept else None
            if problem and notify:
                notify(problem)
        return cls(packed, arena, {v.name: load.read_vector(v, source, refs) for v in plan.vectors})

    @classmethod
    def random(cls, packed: list[PackedWeight], plan: Plan, seed: int = 0, progress: Progress | None = None) -> Self:
        """Random weights of the same sizes and formats, small enough that nothing overflows: for measuring time, which
        does not depend on values."""
        rng = np.random.default_rng(seed)
        arena = Arena(load.weight_bytes(packed), "the weights")
        done, total = 0, sum(p.n_bytes for p in packed)
        for item in packed:
            _fill(item, arena, rng)
            done += item.n_bytes
            if progress:
                progress(done, total)
        return cls(packed, arena, {v.name: rng.standard_normal(v.dim).astype(np.float32) * np.float32(0.1) for v in plan.vectors})

    def close(self) -> None:
        """Gives the memory back. Idempotent; executors that read it must be closed before."""
        self._arena.close()
        self.matrices, self.vectors = {}, {}


def _fill(item: PackedWeight, arena: Arena, rng: np.random.Generator) -> None:
    """Packs a tile of random rows into the matrix again and again."""
    n, k = item.weight.n, item.weight.k
    rows = min(n, max(1, _TILE_VALUES // (k * lib.KV_LANES)) * lib.KV_LANES)
    data, kind = _random_rows(item.dtype, rows, k, rng)
    target = ffi.new("kv_weight *", {"data": ffi.cast("void *", arena.address + item.offset), "dtype": DTYPES[item.dtype], "n": n, "k": k})
    for row in range(0, n, rows):
        if lib.kv_pack(target, row, min(rows, n - row), ffi.from_buffer(data), DTYPES[kind]) != lib.KV_OK:
            raise ModelError(f"{item.weight.name}: cannot make random weights in {item.dtype}")


def _random_rows(dtype: str, rows: int, k: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """[rows][k] values of variance 1/k in a storage kind that packs into `dtype`, as bytes, and that kind."""
    if dtype in ("q8", "q4", "q4s"):  # only blocks of GGUF become these
        kind, codes, levels = ("q8_0", 32, 127) if dtype == "q8" else ("q4_0", 16, 8)
        blocks = np.zeros((rows, k // 32), dtype=[("scale", "<f2"), ("codes", "u1", codes)])
        blocks["scale"] = (3 / k) ** 0.5 / levels  # codes are uniform, of variance levels^2 / 3
        blocks["codes"] = rng.integers(0, 256, blocks["codes"].shape, dtype=np.uint8)
        return blocks.view(np.uint8), kind
    return rng.standard_normal((rows, k), dtype=np.float32) * np.float32(k**-0.5), "f32"

"""What a model on the CUDA executor says, and what its cache holds."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from kvrun.backends.batch import Sampler
from kvrun.cache.formats import PAGE
from kvrun.engine.engine import Engine
from kvrun.engine.events import Token


def answer(engine: Engine, ids: list[int], n: int, **sampler: float) -> list[int]:
    """At most n tokens after the prompt `ids`."""
    return [e.id for e in engine.generate(ids, sampler=Sampler(**sampler), max_tokens=n, stop=[]) if isinstance(e, Token)]


def tokens(rng: np.random.Generator, n: int) -> list[int]:
    """Any n."""
    return rng.integers(0, 256, n).tolist()


def cached(engine: Engine) -> list[np.ndarray]:
    """All that counts of the cache, out of the device's memory: bytes of full pages, K and V of every token, and what a 4-bit page has gathered."""
    from kvrun.backends.reference_cache import LayerPages

    pool, found = engine.pool, []
    for number, (group, plan, table) in enumerate(zip(pool.groups, pool.plan_groups, engine.sequence.tables(), strict=True)):
        full = [page for page, base in zip(table.pages, table.base, strict=True) if base + PAGE <= engine.sequence.length]
        found += [pool.page(number, page) for page in full]
        here = SimpleNamespace(memory=group.read(0, group.layout.page_bytes), side=group.read(group.layout.page_bytes, group.layout.side_bytes),
                               **{name: getattr(group, name) for name in ("k_dtype", "v_dtype", "page_stride", "layer_stride", "v_offset", "side_stride")})
        count = (len(table.base) - 1) * PAGE + engine.sequence.length - table.base[-1]
        for index in range(len(plan.layers)):
            layer = LayerPages(here, index, plan.kv_heads, plan.head_dim)
            found += [half.load(table, table.base[-1])[:, :count].numpy() for half in (layer.k, layer.v)]
            found += [layer.qsq] if layer.qsq is not None else []
    return found


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    """To the bit."""
    return len(one) == len(other) and all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))

"""Planned bytes are allocated bytes; what does not fit is refused with the largest context that does."""

import numpy as np
import pytest

from kvrun.backends.plan import CacheGroup
from kvrun.cache.formats import resolve_kv
from kvrun.cache.planner import MemoryPlan, attended_bytes, cache_bytes, check_fits, largest_n_ctx, pool_layouts, token_bytes, usable
from kvrun.cache.pool import Pool
from kvrun.errors import OutOfMemoryError


@pytest.mark.parametrize("kv", ["f16", "f32", "q8", "q4", "q8/q4", "q4/f16"])
@pytest.mark.parametrize("n_ctx", [1, 128, 129, 2048])
def test_planned_is_allocated(kv: str, n_ctx: int) -> None:
    groups = (CacheGroup(512, (0, 1, 2), 1, 256), CacheGroup(0, (3,), 2, 64))
    formats = resolve_kv(kv, "bfloat16")
    pool = Pool(groups, n_ctx=n_ctx, chunk=256, kv=formats)
    assert pool.n_bytes == cache_bytes(groups, n_ctx=n_ctx, chunk=256, kv=formats)
    assert pool.n_bytes == sum(g.memory.nbytes + g.side.nbytes for g in pool.groups)
    assert all(bool(g.side.nbytes) == ("q4" in kv) for g in pool.groups)
    assert all(not np.any(g.memory) and not np.any(g.side) for g in pool.groups)
    pool.close()


def test_the_classic_figure() -> None:
    """32 layers of 32 KV heads of 128 in 16 bits: 524,288 bytes a token."""
    groups = (CacheGroup(0, tuple(range(32)), 32, 128),)
    assert cache_bytes(groups, n_ctx=4096, chunk=512, kv=("f16", "f16")) == 4096 * 524_288


def test_refusal_names_the_largest_context() -> None:
    def plan_for(n: int) -> MemoryPlan:
        return MemoryPlan(n, 1000, 10 * n, 100)

    assert check_fits(plan_for, 512, 1100 + 5120, headroom=0).total == 6220
    with pytest.raises(OutOfMemoryError, match="--n-ctx 384"):
        check_fits(plan_for, 512, 1100 + 5119, headroom=0)
    with pytest.raises(OutOfMemoryError, match="smaller model"):
        check_fits(plan_for, 512, 1100, headroom=0)
    assert check_fits(plan_for, 10**6, None).n_ctx == 10**6
    assert largest_n_ctx(plan_for, 10**9, 1000) == 1000


def test_headroom_stays_free() -> None:
    def plan_for(n: int) -> MemoryPlan:
        return MemoryPlan(n, 0, 10 * n, 0)

    assert check_fits(plan_for, 900, 10_000).total == 9000
    with pytest.raises(OutOfMemoryError, match="--n-ctx 896"):
        check_fits(plan_for, 901, 10_000)
    assert check_fits(plan_for, 500, 10_000, headroom=0.5).total == 5000
    with pytest.raises(OutOfMemoryError):
        check_fits(plan_for, 501, 10_000, headroom=0.5)
    assert usable(None) is None and usable(1000, 0.25) == 750


def test_what_a_step_reads_stops_growing_at_the_window() -> None:
    groups = (CacheGroup(512, (0, 1, 2), 1, 256), CacheGroup(0, (3,), 2, 64))
    layouts = pool_layouts(groups, n_ctx=2048, chunk=256, kv=("f16", "bf16"))
    sliding, full = 3 * 2 * 256 * 2, 2 * 2 * 64 * 2
    assert token_bytes(layouts) == sliding + full
    assert attended_bytes(groups, layouts, 100) == 100 * (sliding + full)
    assert attended_bytes(groups, layouts, 2000) == 512 * sliding + 2000 * full

"""Planned bytes are allocated bytes; what does not fit is refused with the largest context that does."""

import numpy as np
import pytest

from kvrun.backends.plan import CacheGroup
from kvrun.cache.formats import resolve_kv
from kvrun.cache.planner import MemoryPlan, cache_bytes, check_fits, largest_n_ctx
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

    assert check_fits(plan_for, 512, 1100 + 5120).total == 6220
    with pytest.raises(OutOfMemoryError, match="--n-ctx 384"):
        check_fits(plan_for, 512, 1100 + 5119)
    with pytest.raises(OutOfMemoryError, match="smaller model"):
        check_fits(plan_for, 512, 1100)
    assert check_fits(plan_for, 10**6, None).n_ctx == 10**6
    assert largest_n_ctx(plan_for, 10**9, 1000) == 1000

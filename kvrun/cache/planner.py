"""Bytes before loading: what a model, a cache of n_ctx tokens and the workspace will take, and whether that fits."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvrun.backends.plan import CacheGroup
from kvrun.cache.formats import PAGE, GroupLayout, group_layout
from kvrun.cache.pages import pages_needed
from kvrun.errors import OutOfMemoryError

DEFAULT_HEADROOM = 0.10
"""Share of the available memory that is left alone, for other programs."""


def pool_layouts(groups: tuple[CacheGroup, ...], *, n_ctx: int, chunk: int, kv: tuple[str, str]) -> list[GroupLayout]:
    """The layouts of a Pool of these arguments."""
    return [group_layout(g, *kv, pages_needed(g, n_ctx, chunk)) for g in groups]


def cache_bytes(groups: tuple[CacheGroup, ...], *, n_ctx: int, chunk: int, kv: tuple[str, str]) -> int:
    """Bytes of the whole page pool and of the side memory: exactly what is allocated."""
    return sum(layout.n_bytes for layout in pool_layouts(groups, n_ctx=n_ctx, chunk=chunk, kv=kv))


def token_bytes(layouts: list[GroupLayout]) -> float:
    """Bytes of cache that one more token takes in all layers. Whole but for formats that share scales over a page."""
    return sum(layout.page_stride for layout in layouts) / PAGE


def attended_bytes(groups: tuple[CacheGroup, ...], layouts: list[GroupLayout], depth: int) -> float:
    """Bytes of cache that a decode step reads when `depth` tokens are in it: all of them in full layers, those inside
    the window in sliding ones."""
    return sum((min(depth, g.window) if g.window else depth) * layout.page_stride / PAGE
               for g, layout in zip(groups, layouts, strict=True))


@dataclass(frozen=True)
class MemoryPlan:
    """What a process with an open model takes, in bytes. workspace: activations, logits and kernel scratch. program: Python,
    libraries and the tokenizer; an estimate, where the others are exact."""

    n_ctx: int
    weights: int
    cache: int
    workspace: int
    program: int = 0

    @property
    def total(self) -> int:
        """Everything."""
        return self.weights + self.cache + self.workspace + self.program


def resident_memory() -> int:
    """Bytes of memory that this process has now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def available_memory() -> int | None:
    """Bytes that this process may have in all, what it has now included: the system's, or its control group's if that is
    less. None: unknown."""
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            limits.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass  # another system, or no control groups
    return min(limits) + resident_memory() if limits else None


def usable(available: int | None, headroom: float = DEFAULT_HEADROOM) -> int | None:
    """What may be taken of `available` bytes when the share `headroom` stays free. None: unknown."""
    return None if available is None else int(available * (1 - headroom))


def largest_n_ctx(plan_for: Callable[[int], MemoryPlan], limit: int, upper: int) -> int:
    """The largest n_ctx up to `upper`, a multiple of a page unless it is `upper`, whose plan takes at most `limit`
    bytes; 0 when none does. plan_for must not shrink as n_ctx grows."""
    if plan_for(upper).total <= limit:
        return upper
    low, high = 0, -(-upper // PAGE)  # pages: low fits (or is none), high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plan_for(middle * PAGE).total <= limit else (low, middle)
    return low * PAGE


def check_fits(plan_for: Callable[[int], MemoryPlan], n_ctx: int, available: int | None,
               headroom: float = DEFAULT_HEADROOM, advise: Callable[[int], str] = lambda n: f"use --n-ctx {n}") -> MemoryPlan:
    """The plan for n_ctx. OutOfMemoryError, with the largest n_ctx that fits as `advise` words it, when it takes more
    than `available` bytes less the share `headroom`."""
    plan = plan_for(n_ctx)
    limit = usable(available, headroom)
    if limit is None or plan.total <= limit:
        return plan
    fits = largest_n_ctx(plan_for, limit, n_ctx)
    advice = advise(fits) if fits else "not even the shortest context fits: choose a smaller model"
    mib = 2**20
    raise OutOfMemoryError(
        f"{plan.total / mib:.0f} MiB needed for n_ctx {n_ctx} (weights {plan.weights / mib:.0f}, cache {plan.cache / mib:.0f}, "
        f"workspace {plan.workspace / mib:.0f}, program {plan.program / mib:.0f}), {limit / mib:.0f} MiB usable of {available / mib:.0f} MiB available; {advice}")

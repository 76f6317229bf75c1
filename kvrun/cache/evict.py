"""Which pages a full context gives up. Plain integers: positions of pages and of chat turns, no page numbers.

A dropped page leaves a hole: the pages that stay keep their positions, so keys need no new RoPE. The first pages hold
attention sinks, which a model goes astray without (Xiao et al., 2023, "Efficient streaming language models with
attention sinks"), and are never dropped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from kvrun.cache.formats import PAGE
from kvrun.errors import UsageError

Policy = Callable[[Sequence[int], int, int, Sequence[int]], list[int]]
"""(bases, pinned, need, turns) -> the bases to drop, ascending: at least `need` of them if there are as many that may
go. bases: positions of the held pages, ascending. pinned: how many of the first stay. turns: positions at which chat
turns begin, ascending. The newest page always stays: the next token goes there, or sees it."""


def window(bases: Sequence[int], pinned: int, need: int, turns: Sequence[int]) -> list[int]:
    """The oldest pages, and with them the rest of the turn that they cut, as far as it fills pages. A turn whose rest
    is more than half of what may go is given up page by page."""
    movable = bases[pinned:-1]
    dropped = movable[:need]
    if need <= 0 or not dropped:
        return []
    after = bisect_left(turns, dropped[-1] + PAGE)
    if after < len(turns):
        whole = [base for base in movable if base + PAGE <= turns[after]]
        if need < len(whole) <= len(movable) // 2:
            dropped = whole
    return list(dropped)


def strided(bases: Sequence[int], pinned: int, need: int, turns: Sequence[int]) -> list[int]:
    """Keeps the newer half and, of the older one, every n-th page, where n is a power of two that grows with the text:
    pages whose number has the fewest factors of two go first, the oldest of them before others."""
    movable = bases[pinned:-1]
    older = movable[: len(movable) // 2]
    thinned = sorted(older, key=lambda base: (_factors_of_two(base // PAGE), base))
    return sorted([*thinned, *movable[len(older):]][: max(need, 0)])


def _factors_of_two(n: int) -> int:
    return (n & -n).bit_length() if n else 64


POLICIES: dict[str, Policy] = {"window": window, "strided": strided}


def pinned_tokens(keep: int, n_ctx: int) -> int:
    """`keep` tokens in whole pages, at least one. UsageError when less than two pages of n_ctx are left: the one that
    is written and one of what was just said."""
    pinned = PAGE * max(1, -(-keep // PAGE))
    if n_ctx - pinned >= 2 * PAGE:
        return pinned
    most = n_ctx // PAGE * PAGE - 2 * PAGE
    if most < PAGE:
        raise UsageError(f"--overflow evict needs --n-ctx {3 * PAGE} or more: a page of {PAGE} tokens is kept, two move on")
    raise UsageError(f"--keep {keep} leaves too little of --n-ctx {n_ctx}: at most {most} tokens can be kept, in pages of {PAGE}")


def spans(positions: Iterable[int], size: int = 1) -> tuple[tuple[int, int], ...]:
    """Ascending positions, each the first of `size`, as half-open ranges: (0, 128, 512), 128 -> (0, 256), (512, 640)."""
    found: list[tuple[int, int]] = []
    for first in positions:
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], first + size)
        else:
            found.append((first, first + size))
    return tuple(found)

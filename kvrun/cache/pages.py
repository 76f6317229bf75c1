"""Page bookkeeping in plain integers: which pages a sequence owns in each layer group, and at which positions.

No tensor and no byte of memory is in sight here; pool.py has the memory, the kernels have the attention.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import dataclass

from kvrun.backends.batch import PageTable
from kvrun.backends.plan import CacheGroup
from kvrun.cache.evict import Policy
from kvrun.cache.formats import PAGE
from kvrun.errors import ContextFullError


def pages_needed(group: CacheGroup, n_ctx: int, chunk: int) -> int:
    """Pages that one sequence of n_ctx tokens owns in `group` when steps have at most `chunk` rows.

    A sliding group holds what the first row of a chunk still sees and the chunk itself, plus one page because
    neither end need fall on a page border.
    """
    full = -(-n_ctx // PAGE)
    if not group.window:
        return full
    return min(full, -(-(group.window + chunk) // PAGE) + 1)


class FreeList:
    """The pages of one group that nobody owns."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self._free = array("i", range(n_pages - 1, -1, -1))  # a stack: low numbers first

    def __len__(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """One page; IndexError when none is left."""
        return self._free.pop()

    def give(self, page: int) -> None:
        """Puts a page back."""
        self._free.append(page)


class _GroupPages:
    """One sequence's pages in one group, oldest first."""

    def __init__(self, window: int, free: FreeList) -> None:
        self.window = window
        self.free = free
        self.pages = array("i")
        self.base = array("i")

    def missing(self, end: int) -> int:
        """Pages to take before position end-1 can be stored."""
        covered = self.base[-1] + PAGE if self.base else 0
        return max(0, -(-(end - covered) // PAGE))

    def dead(self, length: int) -> int:
        """How many of the oldest pages no row at position >= length can see."""
        if not self.window:
            return 0
        first_visible = length - self.window + 1
        return next((i for i, base in enumerate(self.base) if base + PAGE > first_visible), len(self.base))

    def drop_oldest(self) -> None:
        self.free.give(self.pages.pop(0))
        self.base.pop(0)

    def drop_newest(self) -> None:
        self.free.give(self.pages.pop())
        self.base.pop()

    def drop(self, bases: set[int]) -> None:
        """Gives these pages back, wherever they are; those that it does not own are no matter."""
        held = list(zip(self.pages, self.base, strict=True))
        self.pages[:] = array("i", (page for page, base in held if base not in bases))
        self.base[:] = array("i", (base for _, base in held if base not in bases))
        for page, base in held:
            if base in bases:
                self.free.give(page)

    def holds(self, position: int) -> bool:
        """Whether the page of `position` is here."""
        base = position // PAGE * PAGE
        at = bisect_left(self.base, base)
        return at < len(self.base) and self.base[at] == base

    def can_rewind(self, length: int, evicted: set[int]) -> bool:
        """Whether a row at position `length` would follow the one before it, and find every position it may see but
        for those on evicted pages."""
        if length == 0:
            return True
        oldest_seen = max(0, length - self.window + 1) if self.window else 0
        seen = range(oldest_seen // PAGE * PAGE, length, PAGE)
        return self.holds(length - 1) and all(base in evicted or self.holds(base) for base in seen)


@dataclass(frozen=True)
class SequenceState:
    """What a sequence of `length` tokens holds, so that it can be held again. bases: positions of the pages of each group, ascending,
    without those that have left a window. evicted, turns: positions of dropped pages and of turns."""

    length: int
    bases: tuple[tuple[int, ...], ...]
    evicted: tuple[int, ...] = ()
    turns: tuple[int, ...] = ()


class Sequence:
    """One token sequence in a page pool: positions 0 to length-1 have (or are about to have) K and V, but for those on
    evicted pages, which leave holes.

    n_ctx: the most tokens that are held at a time. Pages of a sliding group that have left the window stay until the
    group needs them, so that a short rewind works.
    """

    def __init__(self, groups: tuple[CacheGroup, ...], free: list[FreeList], n_ctx: int, *, whole_pages: bool = False) -> None:
        """whole_pages: a page is quantized as a whole, so no step spans two pages and a rewind ends at a page border."""
        self.n_ctx = n_ctx
        self.whole_pages = whole_pages
        self.length = 0
        self.keep = 0
        self._policy: Policy | None = None
        self._turns: list[int] = []
        self._evicted: set[int] = set()
        self._groups = [_GroupPages(g.window, f) for g, f in zip(groups, free, strict=True)]
        # The group that says what a full context holds: one that sees everything, else the one that sees the most.
        self._lead = next((g for g in self._groups if not g.window), max(self._groups, key=lambda g: g.window))

    def evict_with(self, policy: Policy, keep: int) -> None:
        """From now on a full context gives up pages instead of ending. policy: one of cache.evict. keep: the first
        tokens that stay, as pinned_tokens gives them."""
        self._policy = policy
        self.keep = keep

    @property
    def evicts(self) -> bool:
        """Whether a full context gives up pages."""
        return self._policy is not None

    @property
    def held(self) -> int:
        """Positions whose K and V are in the cache."""
        base = self._lead.base
        return (len(base) - 1) * PAGE + self.length - base[-1] if base else 0

    def lost_before(self, n: int) -> int:
        """Positions that a row at n would see, had they not been evicted."""
        oldest_seen = max(0, n - self._lead.window + 1) if self._lead.window else 0
        return PAGE * sum(oldest_seen < base + PAGE and base < n for base in self._evicted)

    def holds(self, position: int) -> bool:
        """Whether K and V of `position` are in the cache."""
        return 0 <= position < self.length and self._lead.holds(position)

    def begin_turn(self) -> None:
        """A turn of a conversation begins at the next position; a policy may give up turns as a whole."""
        if not self._turns or self._turns[-1] != self.length:
            self._turns.append(self.length)

    def most_rows(self, wanted: int) -> int:
        """How many of the next `wanted` tokens one `extend` takes: those that are free, or half of what may go, so that
        the other half, just said, is there to be seen; and those on one page where pages are quantized whole."""
        if self._policy is not None:
            wanted = min(wanted, max(self.n_ctx - self.held, (self.n_ctx - self.keep) // 2))
        return min(wanted, PAGE - self.length % PAGE) if self.whole_pages else wanted

    def extend(self, n: int) -> list[int]:
        """Makes room for n more tokens, at most `most_rows`. Returns the positions of the pages evicted for it.
        ContextFullError, with nothing changed, when n_ctx or the pool ends and nothing may be evicted."""
        end = self.length + n
        if self._policy is None and end > self.n_ctx:
            raise ContextFullError(f"{end} tokens do not fit into the context of {self.n_ctx}; use a larger --n-ctx")
        evicted = self._choose(end)
        drops = [(g, g.missing(end), *self._drops(g, end, evicted)) for g in self._groups]
        if any(missing > len(g.free) + dead + len(dropped) for g, missing, dead, dropped in drops):
            raise ContextFullError(f"no free cache page for {n} more tokens at position {self.length}")
        for group, missing, _, dropped in drops:
            if dropped:
                group.drop(dropped)
                self._evicted |= dropped
            while len(group.free) < missing:
                group.drop_oldest()
            for _ in range(missing):
                base = group.base[-1] + PAGE if group.base else 0
                group.pages.append(group.free.take())
                group.base.append(base)
        self.length = end
        return evicted

    def _choose(self, end: int) -> list[int]:
        """The pages that the leading group gives up so that positions up to end-1 fit."""
        if self._policy is None:
            return []
        lead = self._lead
        dead = lead.dead(self.length)
        need = lead.missing(end) - len(lead.free) - dead
        if not lead.window:
            need = max(need, -(-(self.held + end - self.length - self.n_ctx) // PAGE))
        if need <= 0:
            return []
        bases = lead.base[dead:]
        evicted = self._policy(bases, bisect_left(bases, self.keep), need, self._turns)
        if len(evicted) < need:
            raise ContextFullError(f"{end - self.length} more tokens at position {self.length} need {need} pages, and "
                                   f"{len(evicted)} may be dropped")
        return evicted

    def _drops(self, group: _GroupPages, end: int, evicted: list[int]) -> tuple[int, set[int]]:
        """How many of a group's oldest pages are out of its window, and which others it gives up: those that the leading
        group gives up; a sliding group only where it has no other page, then also those given up before."""
        if group is self._lead or not group.window:
            return group.dead(self.length), set(evicted)
        dead = group.dead(self.length)
        short = max(0, group.missing(end) - len(group.free) - dead)
        gone = (base for base in group.base[dead:-1] if base in evicted or not self._lead.holds(base))
        return dead, {base for base, _ in zip(gone, range(short), strict=False)}

    def truncate(self, n: int) -> bool:
        """Rewinds to the first n tokens; with whole pages to the page border below them, unless nothing goes: `length`
        then says what was kept. False, with nothing changed, when the page of the last of them was evicted, or a sliding
        group has given up a page that the next row would see: the caller must then clear and prefill again."""
        kept = self.rewinds_to(n)
        if kept is None:
            return False
        n = kept
        for group in self._groups:
            while group.base and group.base[-1] >= n:
                group.drop_newest()
        self._evicted = {base for base in self._evicted if base < n}
        del self._turns[bisect_left(self._turns, n + 1 if n else 0):]
        self.length = n
        return True

    def rewinds_to(self, n: int) -> int | None:
        """What `truncate(n)` would leave; None where it cannot."""
        if n > self.length:
            raise ValueError(f"cannot truncate a sequence of {self.length} tokens to {n}")
        if self.whole_pages and n < self.length:
            n -= n % PAGE  # what the open page has gathered about its rows cannot be taken back
        return n if all(g.can_rewind(n, self._evicted) for g in self._groups) else None

    def clear(self) -> None:
        """Gives every page back."""
        self.truncate(0)

    def state(self, length: int | None = None) -> SequenceState:
        """What `adopt` takes to come back to the first `length` tokens, whose pages must still be here; None: all."""
        length = self.length if length is None else length
        bases = tuple(tuple(base for base in g.base[g.dead(length):] if base < length) for g in self._groups)
        return SequenceState(length, bases, tuple(sorted(base for base in self._evicted if base < length)),
                             tuple(turn for turn in self._turns if turn <= length))

    def adopt(self, state: SequenceState) -> list[tuple[int, int, int]]:
        """Becomes the sequence that `state` was taken of. Pages held at its positions stay: they must be of the same text. Returns
        (group, position, page) of the others, whose bytes the caller writes. ContextFullError, with nothing changed, when the pool
        is too small."""
        for group, bases in zip(self._groups, state.bases, strict=True):
            if len(bases) > len(group.free) + len(group.base):
                raise ContextFullError(f"{len(bases)} pages of {state.length} tokens do not fit into this cache; use a larger --n-ctx")
        missing = []
        for index, (group, bases) in enumerate(zip(self._groups, state.bases, strict=True)):
            group.drop(set(group.base) - set(bases))
            pages = dict(zip(group.base, group.pages, strict=True))
            for base in bases:
                if base not in pages:
                    pages[base] = group.free.take()
                    missing.append((index, base, pages[base]))
            group.base[:] = array("i", bases)
            group.pages[:] = array("i", (pages[base] for base in bases))
        self._evicted = set(state.evicted)
        self._turns = list(state.turns)
        self.length = state.length
        return missing

    def could_hold(self, state: SequenceState) -> bool:
        """Whether `state` is one that a sequence of these groups can be in: `adopt` trusts it."""
        if state.length < 1 or len(state.bases) != len(self._groups):
            return False
        last, evicted = (state.length - 1) // PAGE * PAGE, set(state.evicted)
        for group, bases in zip(self._groups, state.bases, strict=True):
            oldest = max(0, state.length - group.window + 1) // PAGE * PAGE if group.window else 0
            if not bases or bases[-1] != last or not evicted.union(bases).issuperset(range(oldest, last, PAGE)):
                return False
        return True

    def tables(self) -> list[PageTable]:
        """The page table of each group. Views of live arrays: valid until the next change of the sequence."""
        return [PageTable(g.pages, g.base) for g in self._groups]

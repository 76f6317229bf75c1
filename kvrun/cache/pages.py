"""Page bookkeeping in plain integers: which pages a sequence owns in each layer group, and at which positions.

No tensor and no byte of memory is in sight here; pool.py has the memory, the kernels have the attention.
"""

from __future__ import annotations

from array import array

from kvrun.backends.batch import PageTable
from kvrun.backends.plan import CacheGroup
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

    def can_rewind(self, length: int) -> bool:
        """Whether a row at position `length` would find every position it may see."""
        oldest_seen = max(0, length - self.window + 1) if self.window else 0
        return length == 0 or (bool(self.base) and self.base[0] <= oldest_seen)


class Sequence:
    """One token sequence in a page pool: `length` positions hold (or are about to hold) K and V.

    Pages of a sliding group that have left the window stay until the group needs them, so that a short rewind works.
    """

    def __init__(self, groups: tuple[CacheGroup, ...], free: list[FreeList], n_ctx: int, *, whole_pages: bool = False) -> None:
        """whole_pages: a page is quantized as a whole, so no step spans two pages and a rewind ends at a page border."""
        self.n_ctx = n_ctx
        self.whole_pages = whole_pages
        self.length = 0
        self._groups = [_GroupPages(g.window, f) for g, f in zip(groups, free, strict=True)]

    def extend(self, n: int) -> None:
        """Makes room for n more tokens. ContextFullError, with nothing changed, when n_ctx or the pool ends."""
        end = self.length + n
        if end > self.n_ctx:
            raise ContextFullError(f"{end} tokens do not fit into the context of {self.n_ctx}; use a larger --n-ctx")
        needs = [(g, g.missing(end), g.dead(self.length)) for g in self._groups]
        if any(missing > len(g.free) + dead for g, missing, dead in needs):
            raise ContextFullError(f"no free cache page for {n} more tokens at position {self.length}")
        for group, missing, _ in needs:
            while len(group.free) < missing:
                group.drop_oldest()
            for _ in range(missing):
                base = group.base[-1] + PAGE if group.base else 0
                group.pages.append(group.free.take())
                group.base.append(base)
        self.length = end

    def most_rows(self, wanted: int) -> int:
        """How many of the next `wanted` tokens one step may have: those on one page where pages are quantized whole."""
        return min(wanted, PAGE - self.length % PAGE) if self.whole_pages else wanted

    def truncate(self, n: int) -> bool:
        """Rewinds to the first n tokens; with whole pages to the page border below them, unless nothing goes. `length`
        then says what was kept. False, with nothing changed, when a sliding group has already given up a page that
        the next row would see: the caller must then clear and prefill again."""
        if n > self.length:
            raise ValueError(f"cannot truncate a sequence of {self.length} tokens to {n}")
        if self.whole_pages and n < self.length:
            n -= n % PAGE  # what the open page has gathered about its rows cannot be taken back
        if not all(g.can_rewind(n) for g in self._groups):
            return False
        for group in self._groups:
            while group.base and group.base[-1] >= n:
                group.drop_newest()
        self.length = n
        return True

    def clear(self) -> None:
        """Gives every page back."""
        self.truncate(0)

    def tables(self) -> list[PageTable]:
        """The page table of each group. Views of live arrays: valid until the next change of the sequence."""
        return [PageTable(g.pages, g.base) for g in self._groups]

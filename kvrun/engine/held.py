"""What a cache holds of a text, and the ways back in it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence as Items
from typing import TYPE_CHECKING

from kvrun.cache.formats import PAGE
from kvrun.engine.history import History
from kvrun.errors import ContextFullError

if TYPE_CHECKING:
    from kvrun.cache.pages import Sequence, SequenceState
    from kvrun.cache.session_pages import Mark, PageArchive

GONE = -1
"""Where a token lies that was dropped before positions were counted anew."""
_WORTH_A_WORD = 32  # tokens: reading fewer again is not worth telling


class Held:
    """The tokens of one sequence, and their places in it.

    tokens: the ids that were read and said, in order. Their K and V are in the cache, but for those that a full context dropped.
    archive: where pages are kept on disk, so that a rewind finds what the cache has given up; None: nowhere.
    history: what was read and said, also where the cache no longer holds it.
    """

    def __init__(self, sequence: Sequence, n_ctx: int) -> None:
        """sequence: an empty one, for n_ctx tokens."""
        self.sequence = sequence
        self.n_ctx = n_ctx
        self.tokens: list[int] = []
        # Where each of `tokens` lies in the sequence: its own index, until the trained length was reached and what was
        # held was read again from position 0.
        self._at = array("i")
        self.archive: PageArchive | None = None
        self.history = History()

    @property
    def held(self) -> int:
        """How many tokens have their K and V in the cache."""
        return self.sequence.held

    @property
    def positions(self) -> Items[int]:
        """Where each of `tokens` lies in the sequence; below 0 for what was dropped before its positions were counted anew."""
        return self._at

    def resume(self, tokens: Items[int], positions: Items[int], mark: Mark) -> None:
        """Takes on what a saved sequence held at `mark` of the archive. DamagedPageError and ContextFullError leave the cache empty."""
        self.sequence.clear()
        try:
            self.archive.load(mark)
        except BaseException:
            self._clear()
            raise
        self.tokens, self._at = list(tokens[: mark.count]), array("i", positions[: mark.count])

    def adopt(self, tokens: Items[int], state: SequenceState, fill: Callable[[list[tuple[int, int, int]]], None]) -> None:
        """Takes on `tokens`, whose pages `fill` writes: the (group, position, page) that `state` names. Where it raises, the cache is
        left empty."""
        self._clear()
        try:
            fill(self.sequence.adopt(state))
        except BaseException:
            self._clear()
            raise
        self.tokens, self._at = list(tokens), array("i", range(len(tokens)))
        self.history.note(0, self.tokens, drawn=False)

    def mark(self) -> None:
        """Makes what is held now a place that a later prompt can come back to without reading anything again; needs an archive."""
        if self.tokens and self._at[-1] != GONE:
            self.archive.mark(len(self.tokens), whole=True)

    def _keep_common_prefix(self, ids: list[int]) -> str | None:
        """Rewinds the cache to what `ids` begins with, but for its last token. Returns what the user must be told."""
        shared = 0
        for mine, wanted in zip(self.tokens, ids[:-1], strict=False):
            if mine != wanted:
                break
            shared += 1
        why = self._rewind(shared)
        if why is None:
            return None
        self._clear()
        if shared < _WORTH_A_WORD:
            return None
        return f"reading the whole prompt again: it differs from what the cache held from token {shared} on, and {why}"

    def _rewind(self, n: int) -> str | None:
        """Takes the cache back to the first n of `tokens`, or to the mark below. Where it no longer holds what came just before, or
        less than half a context would be left of what was once there: why; the cache is then of no use."""
        if n == 0:
            self._clear()
            return None
        if n == len(self.tokens) and self._at[-1] != GONE:
            return None
        length = self._at[n - 1] + 1
        kept = self.sequence.rewinds_to(length) if length else None
        left = 0 if kept is None else kept - self.sequence.lost_before(kept)
        mark = self.archive.best(n) if self.archive else None
        if mark is not None and mark.state.length - PAGE * len(mark.state.evicted) > left:
            return self._restore(mark)
        if kept is None or length - self.sequence.lost_before(length) < min(n, self.n_ctx // 2):
            return "what came before was dropped" if self.sequence.evicts else "the sliding window has moved on"
        self._truncate(length)
        del self.tokens[n:], self._at[n:]
        self._drop_from(self.sequence.length)
        return None

    def _restore(self, mark: Mark) -> str | None:
        """Takes the cache to `mark`, reading from disk what it has given up."""
        from kvrun.cache.session_pages import DamagedPageError

        try:
            self.archive.load(mark)
        except (DamagedPageError, ContextFullError) as error:
            return str(error)
        del self.tokens[mark.count :], self._at[mark.count :]
        self.archive.rewound(mark.state.length)
        return None

    def _truncate(self, length: int) -> bool:
        """Rewinds the sequence and what is on disk of it."""
        done = self.sequence.truncate(length)
        if done and self.archive:
            self.archive.rewound(self.sequence.length)
        return done

    def _drop_from(self, length: int) -> None:
        """Forgets the tokens at positions from `length` on: a rewind may end at the page border below where it was to."""
        while self._at and self._at[-1] >= length:
            self.tokens.pop()
            self._at.pop()

    def _move(self, indices: Iterable[int], positions: Iterable[int]) -> None:
        for index, position in zip(indices, positions, strict=False):
            self._at[index] = position

    def _clear(self) -> None:
        self._truncate(0)
        self.tokens.clear()
        del self._at[:]

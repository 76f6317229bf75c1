"""What was read and said, and by which arithmetic: so that what is computed again is what was there before.

Prompt rows and decoded rows are computed by different arithmetic. Where a cache is lost (a damaged page on disk, a sliding window that
has moved on), ids that had been drawn one by one are therefore read again as decode rows, many in a step: a decoded row's result does
not depend on how many rows share its step (kernels/kvrun.h).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Items

DRAWN_ROWS = 128
"""Decode rows of one step: more are no faster."""


class History:
    """ids: those read and said last, also after the cache has let go of them. drawn: for each, 1 where its K and V come from a decode row."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.drawn = bytearray()

    def set(self, ids: Iterable[int], drawn: Iterable[int]) -> None:
        """Takes on what another process knew."""
        self.ids, self.drawn = list(ids), bytearray(drawn)

    def note(self, at: int, ids: Items[int], drawn: bool) -> None:
        """`ids` were computed at index `at`. What was known of the ids behind them stays only where these are the same again."""
        end = at + len(ids)
        kinds = bytes([drawn]) * len(ids)
        if self.ids[at:end] != ids or self.drawn[at:end] != kinds:
            del self.ids[at:], self.drawn[at:]
            self.ids += ids
            self.drawn += kinds

    def kinds(self, ids: Items[int]) -> bytes:
        """1 for each id at the beginning of `ids` that was drawn when it was read before, 0 where it was part of a prompt; as many as
        are known."""
        shared = next((i for i, (mine, wanted) in enumerate(zip(self.ids, ids, strict=False)) if mine != wanted), min(len(self.ids), len(ids)))
        return bytes(self.drawn[:shared])


def stretch(kinds: bytes, start: int, end: int) -> tuple[int, bool]:
    """From index `start` on: how many ids in a row are to be computed alike, and whether as decode rows. end: of the prompt."""
    drawn = start < len(kinds) and bool(kinds[start])
    change = kinds.find(bytes([not drawn]), start)
    if change < 0:
        change = len(kinds) if drawn else end
    return (min(change - start, DRAWN_ROWS) if drawn else change - start), drawn

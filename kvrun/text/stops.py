"""Stop strings in streamed text."""

from __future__ import annotations


class StopStrings:
    """Finds the first of several strings in text that comes in pieces of any size.

    Holds back only what could be the beginning of a stop string. The text of a stop string is never given out; of two
    that end at once the longer wins, which is the one that began earlier.
    """

    def __init__(self, stops: list[str]):
        self._stops = tuple(stop for stop in dict.fromkeys(stops) if stop)
        self._held = ""
        self._stopped = False
        self.found: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was reached). After a stop: ("", True)."""
        if self._stopped:
            return "", True
        before = len(self._held)
        self._held += text
        end, start = self._first(before)
        if end is not None:
            safe, self._held, self._stopped = self._held[:start], "", True
            return safe, True
        keep = self._pending()
        cut = len(self._held) - keep
        safe, self._held = self._held[:cut], self._held[cut:]
        return safe, False

    def flush(self) -> str:
        """The text still held back: the stream has ended, so it is no stop string."""
        rest, self._held = self._held, ""
        return rest

    def _first(self, before: int) -> tuple[int | None, int]:
        """(end, start) of the stop string in the held text that ends first, after character `before`."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            # One that ends inside the old part would have been found with it.
            at = self._held.find(stop, max(0, before - len(stop) + 1))
            if at >= 0 and (best is None or (at + len(stop), at) < best):
                best, self.found = (at + len(stop), at), stop
        return best if best else (None, 0)

    def _pending(self) -> int:
        """How many characters at the end of the held text could begin a stop string."""
        text = self._held
        longest = 0
        for stop in self._stops:
            for n in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:n]):
                    longest = n
                    break
        return longest

"""Keeps special tokens that a user types text.

A chat template writes special tokens as strings between the messages, so after rendering nothing tells `<|im_end|>` in a
message from the template's own. So before rendering, each special-token string inside the conversation is replaced by a
private-use character; after it, the special tokens still in the text are the template's.

Limits: a template that looks for a special-token string inside a message (to cut reasoning out of an answer, say) does not
find it, and one that measures, slices or sorts a message sees one character where several were typed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_PRIVATE = range(0x100000, 0x10FFFE)      # plane 16: no tokenizer has pieces for it, no text uses it


class Guard:
    """hidden: whether `hide` met a special-token string."""

    def __init__(self, special: Iterable[str]):
        self._special = sorted(filter(None, special), key=len, reverse=True)
        self._marks: dict[str, str] = {}
        self._taken: set[str] = set()
        self._find = None

    @property
    def hidden(self) -> bool:
        return bool(self._marks)

    def hide(self, value):
        """A copy of nested mappings and sequences with special-token strings in every text value replaced."""
        texts = list(_texts(value))
        present = [token for token in self._special if any(token in text for text in texts)]
        if not present:
            return value
        self._taken = {char for text in texts for char in text if ord(char) >= _PRIVATE[0]}
        self._marks = dict(zip(present, self._free(len(present))))
        self._find = _either(present)
        return self._replace(value)

    def split(self, rendered: str) -> tuple[str, bool, dict[str, str]]:
        """Arguments for Encoder.encode: the rendered text with the typed strings put back and the template's special
        tokens as stand-in characters."""
        present = [token for token in self._special if token in rendered]
        stand_ins = dict(zip(self._free(len(present)), present))
        back = {token: char for char, token in stand_ins.items()}
        if present:
            rendered = _either(present).sub(lambda m: back[m[0]], rendered)
        for token, mark in self._marks.items():
            rendered = rendered.replace(mark, token)
        return rendered, False, stand_ins

    def _free(self, n: int) -> list[str]:
        """n characters that nobody uses."""
        free = []
        for code in _PRIVATE:
            if len(free) == n:
                break
            if (char := chr(code)) not in self._taken:
                self._taken.add(char)
                free.append(char)
        return free

    def _replace(self, value):
        if isinstance(value, str):
            return self._find.sub(lambda m: self._marks[m[0]], value)
        if isinstance(value, Mapping):
            return {key: item if key == "role" else self._replace(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._replace(item) for item in value)
        return value


def _either(tokens: list[str]) -> re.Pattern:
    """The longest of the tokens that begins at a place (tokens: longest first)."""
    return re.compile("|".join(map(re.escape, tokens)))


def _texts(value) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key != "role":
                yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)

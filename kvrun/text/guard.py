"""Keeps special tokens that a user types text.

A chat template writes special tokens as strings between the messages, so after rendering nothing tells `<|im_end|>` in
a message from the template's own. So before rendering, each special-token string inside the conversation is replaced
by a private-use character; after it, the special tokens still in the text are the template's.

Some models' turn markers are not marked special in their tokenizer. So tokens that the template spells out count as
well, except in what the assistant said: there, <think> or <tool_call> are its own.

Limits: a template that looks for such a string inside a message (to cut reasoning out of a user's text, say) does not
find it, and one that measures, slices or sorts a message sees one character where several were typed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_PRIVATE = range(0x100000, 0x10FFFE)      # plane 16: private use; no tokenizer has pieces for it


class Guard:
    """special: the tokenizer's special tokens. added: its other added tokens. template: the chat template's source.

    hidden: whether `hide` met one that had to stay text.
    """

    def __init__(self, special: Iterable[str], added: Iterable[str], template: str):
        self._special = frozenset(filter(None, special))
        self._spelled = frozenset(t for t in added if t in template and not t.isspace()) - self._special
        self._marks: dict[str, str] = {}
        self._taken: set[str] = set()

    @property
    def hidden(self) -> bool:
        return bool(self._marks)

    def hide(self, messages, *others):
        """(messages, *others) with such strings replaced in every text value, as copies where there are any."""
        texts = list(_texts((messages, others)))
        present = _present(self._special | self._spelled, texts)
        if not present:
            return (messages, *others)
        self._taken = {char for text in texts for char in text if ord(char) >= _PRIVATE[0]}
        marks = dict(zip(present, self._free(len(present))))

        def mark(match: re.Match) -> str:
            return self._marks.setdefault(match[0], marks[match[0]])

        everything, special = _either(present), _either([t for t in present if t in self._special])
        replaced = [_replace(message, special if _by_assistant(message) else everything, mark) for message in messages]
        return (replaced, *(_replace(other, everything, mark) for other in others))

    def split(self, rendered: str) -> tuple[str, dict[str, str], frozenset[str]]:
        """Arguments for Encoder.encode_marked: the rendered text with the typed strings put back and the template's
        own tokens as stand-in characters."""
        present = _present(self._special | self._spelled, [rendered])
        stand_ins = dict(zip(self._free(len(present)), present))
        back = {token: char for char, token in stand_ins.items()}
        rendered = _either(present).sub(lambda match: back[match[0]], rendered)
        for token, mark in self._marks.items():
            rendered = rendered.replace(mark, token)
        return rendered, stand_ins, self._special | self._spelled

    def _free(self, n: int) -> list[str]:
        """n characters that nobody uses."""
        free = []
        for char in map(chr, _PRIVATE):
            if len(free) == n:
                break
            if char not in self._taken:
                self._taken.add(char)
                free.append(char)
        return free


def _present(tokens: Iterable[str], texts: list[str]) -> list[str]:
    """Those that occur in a text, longest first."""
    return sorted((t for t in tokens if any(t in text for text in texts)), key=lambda t: (-len(t), t))


def _either(tokens: list[str]) -> re.Pattern:
    """The first of the tokens that fits at a place; none of no tokens."""
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def _by_assistant(message) -> bool:
    return isinstance(message, Mapping) and message.get("role") in ("assistant", "model")


def _replace(value, find: re.Pattern, mark):
    if isinstance(value, str):
        return find.sub(mark, value)
    if isinstance(value, Mapping):
        return {key: item if key == "role" else _replace(item, find, mark) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace(item, find, mark) for item in value]
    return value


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

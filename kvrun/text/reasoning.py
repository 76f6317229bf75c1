"""Reasoning blocks in streamed text: what a model thinks aloud between <think> and </think>, apart from what it answers."""

from __future__ import annotations

from typing import Literal

Kind = Literal["think", "answer"]
TAGS = {"<think>": "</think>", "<thinking>": "</thinking>", "<reasoning>": "</reasoning>", "[THINK]": "[/THINK]"}


class Reasoning:
    """Splits an answer that comes in pieces of any size. A block counts only at the answer's beginning, after white space: later such a
    tag is text. begun: the prompt itself has opened the block, with this tag."""

    def __init__(self, begun: str | None = None) -> None:
        self._end = TAGS[begun] if begun else None
        self._before = begun is None      # nothing but white space has come
        self._bare = begun is not None    # a block has just begun or ended: white space after its tag is part of nothing
        self._held = ""

    @property
    def thinking(self) -> bool:
        """Whether a block is open."""
        return self._end is not None

    def push(self, text: str) -> list[tuple[Kind, str]]:
        """The parts that are certain, in order."""
        parts: list[tuple[Kind, str]] = []
        self._held += text
        if self._before:
            self._find_begin()
            if self._before:
                return parts
        if self._bare:
            self._held = self._held.lstrip()
            self._bare = not self._held
        if self._end is not None:
            at = self._held.find(self._end)
            if at >= 0:
                thought, self._held = self._held[:at], self._held[at + len(self._end) :]
                self._end, self._bare = None, True
            else:
                keep = _pending(self._held, (self._end,))
                cut = len(self._held) - keep
                thought, self._held = self._held[:cut], self._held[cut:]
            if thought:
                parts.append(("think", thought))
            if self._end is not None:
                return parts
        if self._bare:
            self._held = self._held.lstrip()
            self._bare = not self._held
        if self._held:
            parts.append(("answer", self._held))
            self._held = ""
        return parts

    def _find_begin(self) -> None:
        body = self._held.lstrip()
        for tag, end in TAGS.items():
            if body.startswith(tag):
                self._before, self._bare, self._end, self._held = False, True, end, body[len(tag) :]
                return
        self._before = not body or any(tag.startswith(body) for tag in TAGS)

    def flush(self) -> list[tuple[Kind, str]]:
        """What is still held back: the answer has ended."""
        rest, self._held = self._held, ""
        return [("think" if self._end is not None else "answer", rest)] if rest else []


def opened_by(prompt_end: str) -> str | None:
    """The tag that the end of a prompt has opened a block with, as some templates do; None for none."""
    body = prompt_end.rstrip()
    return next((tag for tag in TAGS if body.endswith(tag)), None)


def _pending(text: str, tags: tuple[str, ...]) -> int:
    """How many characters at the end of `text` could begin one of `tags`."""
    return max((n for tag in tags for n in range(1, min(len(tag), len(text) + 1)) if text.endswith(tag[:n])), default=0)

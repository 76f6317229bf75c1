"""An answer as it is shown: reasoning apart from the answer itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvrun.text.reasoning import Reasoning, opened_by

if TYPE_CHECKING:
    from kvrun.terminal import Console
    from kvrun.text import Text

_TAIL = 16  # ids at the end of a prompt that may spell the beginning of a reasoning block


class AnswerView:
    """Streams one answer to the console. text: all of it, as the model said it. answer: without its reasoning."""

    def __init__(self, console: Console, text: Text, prompt: list[int], think: str, *, show: bool = True) -> None:
        """prompt: ids before the answer. think: show or hide. show: False writes no answer, only reasoning."""
        decode = text.detokenizer(special=True, continued=True)
        self._parts = Reasoning(opened_by("".join(decode.push(i) for i in prompt[-_TAIL:]) + decode.flush()))
        self._console = console
        self._think = think == "show"
        self._show = show
        self._thoughts = 0
        self.text = self.answer = self.reasoning = ""

    @property
    def thinking(self) -> bool:
        """Whether the answer itself has not begun, because a reasoning block is open."""
        return self._parts.thinking

    def push(self, text: str) -> str:
        """A piece of the answer. Returns what of it is no reasoning."""
        self.text += text
        return self._take(self._parts.push(text))

    def end(self, text: str) -> str:
        """The last piece. Returns as `push`."""
        said = self.push(text) + self._take(self._parts.flush())
        self._console.end_thought()
        if self._show:
            self._console.end_model_text()
        return said

    def _take(self, parts: list[tuple[str, str]]) -> str:
        said = ""
        for kind, part in parts:
            if kind == "answer":
                if self._thoughts:
                    self._console.end_thought()
                    self._thoughts = 0
                said += part
                self.answer += part
                if self._show:
                    self._console.model_text(part)
                continue
            self._thoughts += 1
            self.reasoning += part
            if self._think:
                self._console.thought(part)
            else:
                self._console.progress("thinking", self._thoughts, None, unit="tokens")
        return said

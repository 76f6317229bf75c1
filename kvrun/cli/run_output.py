"""What `kvrun run` prints of an answer: its text, one JSON object, events as they come, or its first code block."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvrun.cli.answer import AnswerView
from kvrun.cli.report import Drops, answer_json, as_json, summary
from kvrun.engine.events import Event, Eviction, Notice, Prefill, Stop, Token
from kvrun.errors import KvrunError
from kvrun.text.reasoning import Reasoning

if TYPE_CHECKING:
    from kvrun.cli.run_answer import Runner

# A fenced code block (CommonMark 0.31, 4.5), also one that the answer's end leaves open.
_BLOCK = re.compile(r"^ {0,3}(?P<fence>`{3,}|~{3,})[^\n`]*\n(?P<code>.*?)(?:^ {0,3}(?P=fence)[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)


class Output:
    """One answer. What must be said of it goes to stderr; what is printed on stdout is for those below."""

    def __init__(self, runner: Runner, ids: list[int]) -> None:
        self.runner = runner
        self.console = runner.console
        self.tokens: list[Token] = []
        self._drops = Drops(self.console.notice)

    def event(self, event: Event) -> None:
        """Takes one event of the generation."""
        self._drops.event(event)
        if isinstance(event, Token):
            self.tokens.append(event)
            self.token(event)
        elif isinstance(event, Notice):
            self.console.notice(event.text)

    def token(self, token: Token) -> None:
        """Takes one token."""

    def end(self, end: Stop) -> None:
        """Takes the Stop, and prints what is left to print."""

    def check(self, end: Stop) -> None:
        """Raises KvrunError when the answer is not what was asked for."""


class TextOutput(Output):
    """The answer on stdout as it is said, its reasoning on stderr. Where the prompt's own text goes on, all of it is the answer."""

    def __init__(self, runner: Runner, ids: list[int]) -> None:
        super().__init__(runner, ids)
        self._view = None if runner.continues else AnswerView(runner.console, runner.engine.text, ids, runner.options.think)

    def token(self, token: Token) -> None:
        if self._view is None:
            self.console.answer(token.text)
        else:
            self._view.push(token.text)

    def end(self, end: Stop) -> None:
        if self._view is None:
            self.console.answer(end.text)
            self.console.end_answer()
        else:
            self._view.end(end.text)


class JsonOutput(Output):
    """One JSON object at the end."""

    def __init__(self, runner: Runner, ids: list[int]) -> None:
        super().__init__(runner, ids)
        self._parts = _Parts(runner, ids)

    def token(self, token: Token) -> None:
        self._parts.push(token.text)

    def end(self, end: Stop, **fields: Any) -> None:
        """fields: what else goes into the object."""
        parts = fields | self._parts.end(end.text)
        self.console.out(answer_json(self.runner.files, self.runner.engine, self.runner.sampler, self.tokens, end, parts))


class JsonLines(Output):
    """Each event as it comes, one JSON object a line."""

    def __init__(self, runner: Runner, ids: list[int]) -> None:
        super().__init__(runner, ids)
        self._parts = _Parts(runner, ids)

    def event(self, event: Event) -> None:
        if isinstance(event, Token):
            kind = "reasoning" if self._parts.push(event.text) else "token"
            record = {"logprob": event.logprob.logprob, "top": [{"id": i, "logprob": p} for i, p in event.logprob.top]} if event.logprob else {}
            self._print(kind, id=event.id, text=event.text, **record)
        elif isinstance(event, Prefill):
            self._print("prefill", **asdict(event))
        elif isinstance(event, Notice):
            self._print("notice", text=event.text)
        elif isinstance(event, Eviction):
            self._print("eviction", **asdict(event))

    def end(self, end: Stop) -> None:
        parts = self._parts.end(end.text)
        self._print("stop", **parts, **summary(self.runner.files, self.runner.engine, self.runner.sampler, end))

    def _print(self, kind: str, **fields: Any) -> None:
        self.console.out(as_json({"event": kind, **fields}))


class CodeOutput(Output):
    """The first fenced code block, and nothing else; reasoning on stderr."""

    def __init__(self, runner: Runner, ids: list[int]) -> None:
        super().__init__(runner, ids)
        self._view = AnswerView(runner.console, runner.engine.text, ids, runner.options.think, show=False)
        self._found = False

    def token(self, token: Token) -> None:
        self._view.push(token.text)
        self.console.progress("answering", len(self.tokens), None, unit="tokens")

    def end(self, end: Stop) -> None:
        self._view.end(end.text)
        self.console.clear_progress()
        block = first_block(self._view.answer)
        if block is not None:
            self._found = True
            self.console.answer(block)
            self.console.end_answer()

    def check(self, end: Stop) -> None:
        if not self._found:
            raise KvrunError("the answer has no fenced code block; run it again without --extract to see it, or ask for code")


def first_block(text: str) -> str | None:
    """What stands in the first fenced code block of a Markdown text; None without one."""
    found = _BLOCK.search(text)
    return found["code"] if found else None


class _Parts:
    """Text, answer and reasoning of an answer that comes in pieces."""

    def __init__(self, runner: Runner, ids: list[int]) -> None:
        from kvrun.cli.run_answer import prompt_end
        from kvrun.text.reasoning import opened_by

        self._split = None if runner.continues else Reasoning(opened_by(prompt_end(runner.engine, ids)))
        self._said = {"think": "", "answer": ""}
        self._text = ""

    def push(self, text: str) -> bool:
        """Whether a reasoning block was open, or is."""
        self._text += text
        if self._split is None:
            self._said["answer"] += text
            return False
        before = self._split.thinking
        for kind, part in self._split.push(text):
            self._said[kind] += part
        return before or self._split.thinking

    def end(self, text: str) -> dict[str, Any]:
        """The last piece -> text, answer, reasoning."""
        self.push(text)
        for kind, part in self._split.flush() if self._split else ():
            self._said[kind] += part
        return {"text": self._text, "answer": self._said["answer"], "reasoning": self._said["think"] or None}

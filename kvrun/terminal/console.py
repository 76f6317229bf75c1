"""The console: the answer on stdout, everything else on stderr."""

from __future__ import annotations

import base64
import errno
import os
import time

from kvrun.errors import StorageError
from kvrun.terminal import streams, termination
from kvrun.terminal.markdown import MarkdownBlocks, render
from kvrun.terminal.sanitize import Sanitizer, one_line, visible

_RED, _DIM, _OFF = "\x1b[1;31m", "\x1b[2m", "\x1b[0m"
_REDRAW_SECONDS = 0.1


def human_bytes(n: float) -> str:
    """Bytes in binary units, three digits: 4096 -> "4.00 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}" if n >= 100 else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


class Console:
    """Writes to the two output streams of this process.

    color: "auto", "always" or "never". sanitize: "auto" shows control characters of foreign text where stdout is a
    terminal, "never" passes them on. quiet: no notices and no progress; errors stay.
    """

    def __init__(self, *, color: str = "auto", sanitize: str = "auto", quiet: bool = False,
                 verbose: bool = False) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self.stdout_is_terminal = streams.is_terminal(streams.STDOUT)
        self.stderr_is_terminal = streams.is_terminal(streams.STDERR)
        self.stderr_color = streams.color_wanted(color, streams.STDERR)
        self._sanitizer = Sanitizer() if self.stdout_is_terminal and sanitize == "auto" else None
        # A live line needs a carriage return and an erase; a dumb terminal has no erase.
        self._live = self.stderr_is_terminal and not quiet and os.environ.get("TERM", "dumb") != "dumb"
        self._drawn = False
        self._next_draw = 0.0
        self._held = ""           # newlines at the end of the answer so far, but for the first of them
        self._line: bool | None = None  # whether the answer's last line is open; None: nothing of it is out yet
        self._thought = ""        # the end of the reasoning shown so far
        self._blocks: MarkdownBlocks | None = None

    # ---- stdout ----

    def answer(self, text: str) -> None:
        """Streams model text. Of the newlines at its end only the first is written before more text follows, so that
        the answer ends with exactly one."""
        if self._sanitizer is not None:
            text = self._sanitizer.push(text)
        if not text:
            return
        text = self._held + text
        body = text.rstrip("\n")
        tail = text[len(body):]
        if body or self._line:
            ready, self._held = body + tail[:1], tail[1:]
            self._line = not tail
            self.out(ready)
        else:
            self._held = tail

    def end_answer(self) -> None:
        """Ends the answer, also an empty one, with exactly one newline."""
        rest = self._sanitizer.flush() if self._sanitizer is not None else ""
        if rest or self._line is not False:
            self.out((self._held if rest else "") + rest + "\n")
        self._held, self._line = "", None

    def markdown(self) -> None:
        """From now on answers on a terminal are shown as Markdown, block by block; elsewhere they are the model's own text."""
        if self.stdout_is_terminal:
            self._blocks = MarkdownBlocks()

    def model_text(self, text: str) -> None:
        """Streams an answer in the way that is set."""
        if self._blocks is None:
            self.answer(text)
        else:
            for block in self._blocks.push(text):
                self._render(block)

    def end_model_text(self) -> None:
        """Ends an answer with a newline."""
        if self._blocks is None:
            self.end_answer()
        else:
            self._render(self._blocks.flush())

    def _render(self, block: str) -> None:
        self.out(render(block, color=streams.color_wanted("auto", streams.STDOUT)) if block.strip() else "")

    def line(self, text: str) -> None:
        """One line of a command's own report; foreign text in it is made visible on a terminal."""
        self.out((visible(text) if self.stdout_is_terminal else text) + "\n")

    def prose(self, text: str) -> None:
        """As `line`, for a sentence: broken between words where a terminal would break it amid one."""
        self.line(self._fitted(text, stream=streams.STDOUT))

    def row(self, text: str) -> None:
        """One row of a table, cut at the edge of a terminal: rows that run over it are hard to read. Elsewhere it is whole."""
        text, columns = visible(text) if self.stdout_is_terminal else text, streams.columns(streams.STDOUT)
        self.out((text[: columns - 1] + "…" if self.stdout_is_terminal and len(text) > columns else text) + "\n")

    def out(self, text: str) -> None:
        """Writes text to stdout as it is, at once. BrokenPipeError when its reader has gone; a terminal that has gone is as SIGHUP."""
        self.clear_progress()
        try:
            streams.write_all(streams.STDOUT, text.encode("utf-8", "replace"))
        except BrokenPipeError:
            raise
        except OSError as error:
            if error.errno == errno.EIO and self.stdout_is_terminal and termination.hung_up():
                return
            raise StorageError(f"cannot write to standard output: {error.strerror}") from error

    # ---- stderr ----

    def notice(self, text: str) -> None:
        """Something the user should know; not with -q."""
        if not self.quiet:
            self._message(self._fitted(f"kvrun: {one_line(text)}"), _DIM)

    def report(self, text: str, indent: int = 0) -> None:
        """A line that was asked for (--stats), also with -q. indent: columns before what does not fit on a terminal's line."""
        self._message(self._fitted(one_line(text), indent))

    def thought(self, text: str) -> None:
        """Streams reasoning, dimmed."""
        self.clear_progress()
        text = visible(text)
        self._thought = text or self._thought
        shown = f"{_DIM}{text}{_OFF}" if self.stderr_color else text
        streams.write_if_possible(streams.STDERR, shown.encode("utf-8", "replace"))

    def end_thought(self) -> None:
        """The reasoning is over: what follows begins on a line of its own, after an empty one."""
        if self._thought:
            newlines = 2 - min(2, len(self._thought) - len(self._thought.rstrip("\n")))
            streams.write_if_possible(streams.STDERR, b"\n" * newlines)
            self._thought = ""

    def copy(self, text: str) -> bool:
        """Gives text to the terminal's clipboard (OSC 52). False where no stream is a terminal."""
        if not (self.stderr_is_terminal or self.stdout_is_terminal):
            return False
        stream = streams.STDERR if self.stderr_is_terminal else streams.STDOUT
        streams.write_if_possible(stream, b"\x1b]52;c;" + base64.b64encode(text.encode("utf-8", "replace")) + b"\x07")
        return True

    def error(self, text: str) -> None:
        """The one line of a failure."""
        head = "kvrun: error:"
        text = self._fitted(f"{head} {one_line(text)}")
        self._message(f"{_RED}{head}{_OFF}{text.removeprefix(head)}" if self.stderr_color else text)

    def trace(self, text: str) -> None:
        """A traceback, for -v."""
        self._message(visible(text).rstrip("\n"))

    def _fitted(self, text: str, indent: int = 0, stream: int = streams.STDERR) -> str:
        """One line, broken between words where a terminal would break it amid one. Elsewhere it stays one line, and a long path stays whole."""
        on_terminal = self.stderr_is_terminal if stream == streams.STDERR else self.stdout_is_terminal
        if not on_terminal or len(text) <= (columns := streams.columns(stream)):
            return text
        import textwrap

        return "\n".join(textwrap.wrap(text, max(columns, indent + 20), subsequent_indent=" " * indent, expand_tabs=False, replace_whitespace=False,
                                       break_long_words=False, break_on_hyphens=False))

    def _message(self, text: str, style: str = "") -> None:
        self.clear_progress()
        if style and self.stderr_color:
            text = f"{style}{text}{_OFF}"
        if self.stderr_is_terminal and self.stdout_is_terminal and self._line:
            text = "\n" + text       # the answer's line is open on the same screen
            self._line = False
        streams.write_if_possible(streams.STDERR, (text + "\n").encode("utf-8", "replace"))

    # ---- progress, on stderr when that is a terminal ----

    def progress(self, label: str, done: int, total: int | None, *, unit: str = "") -> None:
        """Redraws the status line. done, total: bytes when unit is "B", else counted in `unit`. At most ten a second."""
        now = time.monotonic()
        if not self._live or (now < self._next_draw and done != total):
            return
        self._next_draw = now + _REDRAW_SECONDS
        if unit == "B":
            amount = f"{human_bytes(done)} of {human_bytes(total)}" if total else human_bytes(done)
        else:
            amount = f"{done}/{total} {unit}".rstrip() if total else f"{done} {unit}".rstrip()
        share = f" {100 * done // total:3d} %" if total else ""
        text = f"{one_line(label)}: {amount}{share}"[: max(streams.columns(streams.STDERR) - 1, 1)]
        self._drawn = True
        streams.write_if_possible(streams.STDERR, f"\r\x1b[K{text}".encode("utf-8", "replace"))

    def clear_progress(self) -> None:
        """Takes the status line away."""
        if self._drawn:
            self._drawn, self._next_draw = False, 0.0
            streams.write_if_possible(streams.STDERR, b"\r\x1b[K")

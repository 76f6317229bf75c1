"""Where a chat's lines come from: an edited prompt on a terminal, plain lines from a pipe."""

from __future__ import annotations

import errno
import os
import signal
import termios
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kvrun.errors import UsageError
from kvrun.terminal import streams, termination
from kvrun.terminal.sanitize import one_line

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.document import Document
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent


class LineCleared(Exception):
    """Ctrl-C took back a line that had been typed."""


class LineReader(Protocol):
    """Gives one message at a time."""

    def read(self, default: str = "") -> str:
        """The next message, without its newline. default: text to begin with, where it can be edited. EOFError at the
        end, KeyboardInterrupt for Ctrl-C at an empty prompt, LineCleared for Ctrl-C at any other, UsageError for a line
        that is no text."""


Completions = Callable[[str], Iterable[tuple[str, int]]]
"""Text before the cursor -> (text to put in, how many characters before the cursor it replaces)."""


class TerminalLines:
    """Line editing with history; a pasted text of several lines is one message, and Alt-Enter or Ctrl-J begins a line."""

    def __init__(self, history: Path | None, *, status: Callable[[], str] = str, completions: Completions | None = None,
                 color: bool = True, remember: bool = True) -> None:
        """history: its file, made if absent, readable by its owner alone; None keeps it in memory. remember: False reads it alone. status: the line below
        the prompt. completions: what Tab offers."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.layout.processors import TabsProcessor
        from prompt_toolkit.output import ColorDepth, create_output
        from prompt_toolkit.styles import Style

        class ReadHistory(FileHistory):
            """Offers what earlier chats left, and leaves nothing."""

            def store_string(self, string: str) -> None:
                pass

        if history is not None and remember:
            history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(history, os.O_CREAT | os.O_APPEND, 0o600))
        # The prompt goes to the terminal also when the answers go elsewhere.
        self._session = PromptSession(
            output=create_output(always_prefer_tty=True), history=(FileHistory if remember else ReadHistory)(str(history)) if history else InMemoryHistory(),
            bottom_toolbar=lambda: one_line(status()), style=Style([("bottom-toolbar", "noreverse fg:ansibrightblack")]),
            color_depth=None if color else ColorDepth.DEPTH_1_BIT, key_bindings=_newline_keys(), prompt_continuation="  ",
            completer=_completer(completions) if completions else None, complete_while_typing=False, reserve_space_for_menu=4,
            enable_suspend=True, input_processors=[TabsProcessor(char1=" ", char2=" ")])

    def read(self, default: str = "") -> str:
        try:
            with termination.ended_by(self._end):
                return self._session.prompt("> ", default=default, pre_run=self._end_if_terminated)
        except KeyboardInterrupt:
            if self._session.default_buffer.text:
                raise LineCleared from None
            raise
        except OSError as error:
            if error.errno == errno.EIO and termination.hung_up():
                raise termination.Terminated from None
            raise

    def _end(self) -> None:
        """Takes the prompt away from a signal handler: the event loop does it, as soon as it is there."""
        loop = self._session.app.loop
        if loop is not None:
            loop.call_soon_threadsafe(self._end_if_terminated)

    def _end_if_terminated(self) -> None:
        app = self._session.app
        if termination.requested() and app.future is not None and not app.future.done():
            app.exit(exception=termination.Terminated)


def _newline_keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _completer(completions: Completions) -> Completer:
    from prompt_toolkit.completion import Completer, Completion

    class Offered(Completer):
        """What `completions` says."""

        def get_completions(self, document: Document, complete_event: object) -> Iterator[Completion]:
            for text, replaced in completions(document.text_before_cursor):
                yield Completion(text, start_position=-replaced)

    return Offered()


class PipedLines:
    """One message a line of standard input."""

    def __init__(self) -> None:
        self._file = open(streams.STDIN, "rb", closefd=False)  # noqa: SIM115 - lives as long as the process
        self._number = 0

    def read(self, default: str = "") -> str:
        try:
            line = end = self._file.readline(streams.MOST_TEXT + 1)
            while len(line) > streams.MOST_TEXT and end and not end.endswith(b"\n"):
                end = self._file.readline(1 << 20)
        except OSError:  # closed: as if it were empty
            line = b""
        if not line:
            raise EOFError
        self._number += 1
        if len(line) > streams.MOST_TEXT:
            raise UsageError(f"line {self._number} of standard input has more than {streams.MOST_TEXT >> 20} MiB; it was skipped")
        try:
            return line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise UsageError(f"line {self._number} of standard input is not UTF-8 text; it was skipped") from None


@contextmanager
def typed_ahead() -> Iterator[None]:
    """While inside, what is typed between two prompts does not appear amid an answer: it waits for the next prompt, and Enter ends
    a message there too. Ctrl-C works as ever, but what was said before it is not lost on its way to the screen. Ctrl-Z, too: what goes on
    afterwards finds the terminal as it was when it stopped."""
    if not streams.is_terminal(streams.STDIN):
        yield
        return
    before = termios.tcgetattr(streams.STDIN)
    silent = [*before]
    silent[3] = silent[3] & ~termios.ECHO | termios.NOFLSH
    silent[0] &= ~termios.ICRNL  # or Enter would come as Ctrl-J, which begins a line
    termios.tcsetattr(streams.STDIN, termios.TCSANOW, silent)
    ignored = signal.getsignal(signal.SIGTSTP) is signal.SIG_IGN
    try:
        if not ignored:
            signal.signal(signal.SIGTSTP, _stop)
        yield
    finally:
        if not ignored:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        with suppress(OSError, termios.error):  # the terminal may be gone
            termios.tcsetattr(streams.STDIN, termios.TCSANOW, before)


def forget_typed() -> None:
    """Drops what was typed ahead, as Ctrl-C does where the terminal is not told otherwise."""
    with suppress(termios.error):
        termios.tcflush(streams.STDIN, termios.TCIFLUSH)


def _stop(signum: int, frame: object) -> None:
    """Ctrl-Z: stops the process, and makes the terminal its own again when it goes on; shells take theirs back, and do not return it."""
    with suppress(OSError, termios.error):
        mine = termios.tcgetattr(streams.STDIN)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, _stop)
        if os.tcgetpgrp(streams.STDIN) == os.getpgrp():  # in the background it would stop again
            termios.tcsetattr(streams.STDIN, termios.TCSANOW, mine)

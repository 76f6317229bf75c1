"""A real pseudo-terminal with a screen: what a person would see."""

from __future__ import annotations

import re
import time

import pexpect
import pyte

COLUMNS, ROWS = 80, 24


class Terminal:
    """A command on a pseudo-terminal, which answers when it is asked where the cursor is, as prompt_toolkit asks it. tail: the end of what
    the command has written."""

    def __init__(self, command: list[str], environment: dict, columns: int = COLUMNS, rows: int = ROWS) -> None:
        self.process = pexpect.spawn(command[0], command[1:], env=environment, dimensions=(rows, columns), timeout=60)
        self.tail = b""

    def show(self, data: bytes) -> tuple[int, int]:
        """Takes what the command has written. Returns the cursor's row and column after it, from 1."""
        self.tail = (self.tail + data)[-6000:]
        return 1, 1

    def read(self, seconds: float = 0.05) -> bool:
        """Reads what is there within `seconds`. False at the end."""
        try:
            data = self.process.read_nonblocking(1 << 16, timeout=seconds)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        row, column = self.show(data)
        if b"\x1b[6n" in data:
            self.process.send(f"\x1b[{row};{column}R")
        return True

    def send(self, text: str) -> None:
        self.process.send(text)

    def closed(self) -> int:
        """After the end: the exit code, or minus the signal."""
        self.process.wait()  # closing a terminal whose process is still on its way out would send it SIGHUP
        self.process.close()
        return self.process.exitstatus if self.process.exitstatus is not None else -self.process.signalstatus


class Screen(Terminal):
    """A command on a terminal with a screen. `display` is the screen after everything read so far, trailing blanks cut."""

    def __init__(self, command: list[str], environment: dict, columns: int = COLUMNS, rows: int = ROWS) -> None:
        super().__init__(command, environment, columns, rows)
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""

    def show(self, data: bytes) -> tuple[int, int]:
        self.raw += data
        self._stream.feed(data)
        return self.screen.cursor.y + 1, self.screen.cursor.x + 1

    @property
    def display(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def wait(self, condition, seconds: float = 60) -> str:
        """Reads until condition(display) holds."""
        deadline = time.monotonic() + seconds
        while not condition(self.display):
            assert time.monotonic() < deadline, f"waited in vain; the screen is:\n{self.display}\nraw: {self.raw[-500:]!r}"
            assert self.read(), f"it ended; the screen is:\n{self.display}"
        return self.display

    def wait_for(self, text: str) -> str:
        """Reads until `text` is on the screen."""
        return self.wait(lambda display: text in display)

    def wait_prompt(self) -> str:
        """Reads until the screen ends with an empty chat prompt and the status line below it."""
        return self.wait(lambda display: re.search(r"(^|\n)>\n+ctx \d+/\d+ · kv .*$", display))

    def ask(self, line: str, expected: str) -> str:
        """Enters a line at the prompt and reads until `expected` is shown below it and the prompt is back."""
        shown = self.display.count(expected)
        self.send(line + "\r")
        self.wait(lambda display: display.count(expected) > shown)
        return self.wait_prompt()

    def end(self) -> int:
        """Reads to the end. The exit code, or minus the signal."""
        while self.read(1):
            pass
        return self.closed()

"""SIGTERM, and SIGHUP when the terminal closes: what they do depends on what goes on when they come.

An exception raised by a signal handler is right where temporary files are to be cleaned up. It is wrong inside an event loop, which
would report it as an error of its own, in the middle of a save, and while modules load, whose locks would stay taken and keep another
thread waiting for ever. So whoever is at work says how it is ended; where nobody does, the process ends at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvrun.terminal import streams

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class Terminated(BaseException):
    """SIGTERM or SIGHUP came."""


_endings: list[Callable[[], None]] = []
_cleanups: list[Callable[[], object]] = []
_signal = 0  # the one that came
_terminal: list | None = None


def requested() -> bool:
    """Whether SIGTERM or SIGHUP has come."""
    return bool(_signal)


def exit_code() -> int:
    """128 + the signal that came, as shells have it."""
    return 128 + _signal


def install() -> None:
    """From now on SIGTERM and SIGHUP end the process with `exit_code()`: at once, but for the blocks below. nohup's SIGHUP stays ignored."""
    global _terminal
    with contextlib.suppress(OSError, termios.error):
        _terminal = termios.tcgetattr(streams.STDIN)
    sys.unraisablehook = _unraisable
    signal.signal(signal.SIGTERM, _on_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _on_signal)


def hung_up() -> bool:
    """The terminal is gone: from now on as after SIGHUP, which may yet be on its way from the shell. False where SIGHUP is ignored."""
    if signal.getsignal(signal.SIGHUP) is not _on_signal:
        return False
    if not _signal:
        _on_signal(signal.SIGHUP)
    return True


def _on_signal(signum: int, frame: object = None) -> None:
    global _signal
    again = signum == _signal == signal.SIGTERM  # SIGHUP comes twice by itself: from the kernel and from the shell
    if not _signal or signum == signal.SIGTERM:
        _signal = signum
    if again or not _endings:
        _leave(exit_code())
    _endings[-1]()


def _leave(code: int) -> None:
    """Ends the process here and now, with the terminal as it was found."""
    from kvrun.terminal import console

    console().clear_progress()
    for clean in _cleanups:
        clean()
    if _terminal is not None:
        with contextlib.suppress(OSError, termios.error):
            if termios.tcgetattr(streams.STDIN) != _terminal:
                termios.tcsetattr(streams.STDIN, termios.TCSANOW, _terminal)
                # What a line editor switches on: bracketed paste, a hidden cursor, a style.
                streams.write_if_possible(streams.STDOUT if streams.is_terminal(streams.STDOUT) else streams.STDIN, b"\x1b[?2004l\x1b[?25h\x1b[0m")
    os._exit(code)


def _unraisable(unraisable: object) -> None:
    """Terminated was raised where Python drops exceptions, as in a destructor."""
    if isinstance(getattr(unraisable, "exc_value", None), Terminated):
        _leave(exit_code())
    sys.__unraisablehook__(unraisable)


def _raise() -> None:
    raise Terminated


@contextmanager
def raising() -> Iterator[None]:
    """While inside, and inside nothing below, a signal raises Terminated, so that what is open is cleaned up."""
    with ended_by(_raise):
        yield


@contextmanager
def cleaned_by(clean: Callable[[], object]) -> Iterator[None]:
    """While inside, a process that ends at once calls `clean` before."""
    _cleanups.append(clean)
    try:
        yield
    finally:
        _cleanups.remove(clean)


@contextmanager
def at_once() -> Iterator[None]:
    """While inside, Ctrl-C too ends the process at once: modules load in several threads, and nothing is there to be saved."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGINT, lambda signum, frame: _leave(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def ended_by(stop: Callable[[], None]) -> Iterator[None]:
    """While inside, such a signal calls `stop`, which makes the block end in its own way; then it is the enclosing block's turn.
    stop: runs between two bytecodes of the main thread, maybe twice. A second SIGTERM ends the process at once."""
    _endings.append(stop)
    try:
        if _signal:  # it came just before
            stop()
        yield
    finally:
        _endings.pop()
    if _signal:
        _endings[-1]() if _endings else _raise()


@contextmanager
def held() -> Iterator[None]:
    """While inside, they wait: a save goes on to its end."""
    with ended_by(lambda: None):
        yield

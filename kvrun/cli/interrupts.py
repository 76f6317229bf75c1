"""Ctrl-C, SIGTERM and SIGHUP while an answer is being computed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvrun.terminal import termination
from kvrun.terminal.lines import forget_typed

if TYPE_CHECKING:
    from kvrun.engine import Engine


@contextmanager
def interrupts(engine: Engine, *, stay: bool = False) -> Iterator[None]:
    """While inside, the first SIGINT ends the answer after the step in progress, and a second one raises
    KeyboardInterrupt; stay: further ones only drop what was typed ahead. A process that ignores SIGINT goes on ignoring it. SIGTERM and SIGHUP
    end the answer in the same way."""
    def handler(signum: int, frame: object) -> None:
        if stay:
            forget_typed()
        else:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        engine.interrupt()

    with termination.ended_by(engine.interrupt), _handled_by(handler):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """While inside, and inside nothing below or above, SIGINT does nothing: an answer is recorded and saved."""
    with _handled_by(lambda signum, frame: None):
        yield


@contextmanager
def interruptible() -> Iterator[None]:
    """While inside, SIGINT raises KeyboardInterrupt."""
    with _handled_by(signal.default_int_handler):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

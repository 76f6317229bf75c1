"""Ctrl-C and SIGTERM while an answer is being computed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvrun.terminal import termination

if TYPE_CHECKING:
    from kvrun.engine import Engine


@contextmanager
def interrupts(engine: Engine) -> Iterator[None]:
    """While inside, the first SIGINT ends the answer after the step in progress, and a second one raises
    KeyboardInterrupt. A process that ignores SIGINT goes on ignoring it. SIGTERM ends the answer in the same way."""
    with termination.ended_by(engine.interrupt), _ctrl_c(engine):
        yield


@contextmanager
def _ctrl_c(engine: Engine) -> Iterator[None]:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return

    def handler(signum: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        engine.interrupt()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

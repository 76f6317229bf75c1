"""The standard streams as bytes: UTF-8 whatever the locale, every write complete and at once."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys

STDIN, STDOUT, STDERR = 0, 1, 2
MOST_TEXT = 64 << 20
"""Bytes of a file, of standard input or of one line of it: more than any context holds."""


def guard_closed_streams() -> None:
    """Puts a handle that cannot be used where a standard stream is closed, so that no file opened later gets its
    number and is written into. Writing to such a stream then fails as it would have."""
    for fd, flags in ((STDIN, os.O_WRONLY), (STDOUT, os.O_RDONLY), (STDERR, os.O_RDONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)  # the lowest free number: fd itself


def utf8_text_streams() -> None:
    """Makes what still goes through sys.stdout and sys.stderr (help texts, warnings of libraries) UTF-8 too."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def is_terminal(fd: int) -> bool:
    """Whether `fd` is a terminal; False when it is closed."""
    try:
        return os.isatty(fd)
    except OSError:
        return False


def color_wanted(choice: str, fd: int) -> bool:
    """Colour for one stream. choice: "always", "never" or "auto": on a terminal, unless NO_COLOR (no-color.org) is
    set or TERM says that it cannot."""
    if choice != "auto":
        return choice == "always"
    return is_terminal(fd) and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def columns(fd: int) -> int:
    """How wide the terminal `fd` is; 80 where it does not say. (shutil asks stdout, which may be a file.)"""
    try:
        return os.get_terminal_size(fd).columns or 80
    except OSError:
        return 80


def write_all(fd: int, data: bytes) -> None:
    """Writes every byte, also to a pipe that somebody made non-blocking. OSError as write(2) has it."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view):]
        except BlockingIOError:
            select.select([], [fd], [])


def write_if_possible(fd: int, data: bytes) -> None:
    """As `write_all`, for messages that nobody need read: a closed or broken stream is no failure."""
    with contextlib.suppress(OSError):
        write_all(fd, data)


def flush_text_streams() -> None:
    """Flushes sys.stdout and sys.stderr. BrokenPipeError when the reader of stdout has gone; later flushes at exit
    then find nothing to do."""
    for stream in (sys.stderr, sys.stdout):
        if stream is None or stream.closed:
            continue
        try:
            stream.flush()
        except OSError as error:
            with open(os.devnull, "wb") as sink:
                os.dup2(sink.fileno(), stream.fileno())
            if stream is sys.stdout:
                raise
            if error.errno not in (errno.EPIPE, errno.EBADF, errno.EIO, errno.ENOSPC):
                raise

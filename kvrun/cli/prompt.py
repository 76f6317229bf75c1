"""Where a prompt comes from: -f files, piped standard input, and the argument."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from pathlib import Path

from kvrun.errors import StorageError, UsageError
from kvrun.terminal import console, streams

_STDIN = Path("-")


def gather_prompt(argument: str | None, files: Sequence[Path], *, raw: bool) -> str:
    """The whole prompt: files, then standard input when it is no terminal, then the argument, a blank line between.

    "-" as the argument stands for standard input alone, and among the files it says where standard input goes. A final
    newline of a file or of standard input is dropped, unless `raw` and there is just that one part, which is then taken
    as it is. Raises UsageError when nothing is given or all of it is empty, or what is given is no UTF-8 text;
    StorageError when a file cannot be read.
    """
    from_terminal, among_files = streams.is_terminal(streams.STDIN), _STDIN in files
    if from_terminal and (argument == "-" or among_files):
        raise UsageError(f"{'-f' if among_files else 'PROMPT'} is '-' and standard input is a terminal; pipe text into it or write the prompt out")
    parts = [read_stdin() if path == _STDIN else read_file(path) for path in files]
    if not from_terminal and not among_files:
        parts.append(read_stdin())
    if argument not in (None, "-"):
        parts.append(_argument_text(argument))
    if argument is None and not parts:
        raise UsageError("no prompt; give PROMPT, -f FILE, or pipe text into standard input (for a conversation: 'kvrun chat')")
    parts = [part for part in parts if part]
    if len(parts) > 1 or not raw:
        parts = [_without_final_newline(part) for part in parts]
        text = "\n\n".join(part for part in parts if part)
    else:
        text = "".join(parts)
    if not (text if raw else text.strip()):
        raise UsageError("the prompt is empty; give PROMPT, -f FILE, or pipe text into standard input")
    return text


def _without_final_newline(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")


def _argument_text(argument: str) -> str:
    """The argument's bytes as UTF-8, whatever the locale decoded them as."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        try:
            argument.encode("utf-8")  # text of another locale
        except UnicodeEncodeError:
            raise UsageError("PROMPT is not UTF-8 text") from None
        return argument


def read_stdin() -> str:
    """Standard input as UTF-8 text, without a byte order mark. Raises UsageError when it is none, or without end. While nothing comes the
    terminal says what is waited for: it may be a pipe that nobody will close."""
    data = bytearray()
    try:
        while len(data) <= streams.MOST_TEXT:
            while not select.select([streams.STDIN], [], [], 1)[0]:
                console().progress("waiting for standard input to end", len(data), None, unit="B")
            if not (chunk := os.read(streams.STDIN, 1 << 16)):
                break
            data += chunk
    except OSError:  # closed: as if it were empty
        return ""
    finally:
        console().clear_progress()
    return _decode(_bounded(data, "standard input"), "standard input")


def read_file(path: Path) -> str:
    """A file of UTF-8 text, without a byte order mark. Raises UsageError when it is none, StorageError."""
    try:
        with path.open("rb") as file:
            data = file.read(streams.MOST_TEXT + 1)
        return _decode(_bounded(data, str(path)), str(path))
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def _bounded(data: bytes, where: str) -> bytes:
    if len(data) > streams.MOST_TEXT:
        raise UsageError(f"{where} has more than {streams.MOST_TEXT >> 20} MiB, more than any context holds; give a part of it")
    return data


def _decode(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}; convert it first "
                         "(iconv) or give another file") from None
    zero = text.find("\0")
    if zero >= 0:
        raise UsageError(f"{where} is binary: a zero byte at offset {len(text[:zero].encode())}; give text")
    return text.removeprefix("\ufeff")

"""Errors that a user sees, each with its exit code. The message is one line: what, where, what to do."""

from __future__ import annotations


def show(value: object) -> str:
    """A short, printable form of a value that came from a file: it may be huge or hold control characters."""
    if isinstance(value, str):
        return ascii(value if len(value) <= 60 else value[:57] + "...")
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() <= 128 else "an integer of hundreds of digits"
    return f"a {type(value).__name__}"


class KvrunError(Exception):
    """Base of every expected failure. `exit_code` is what the command exits with."""

    exit_code = 1


class UsageError(KvrunError):
    """The command line cannot be carried out as written."""

    exit_code = 2


class NotFoundError(KvrunError):
    """A model, file or revision does not exist, or is not here while offline."""

    exit_code = 3


class AccessError(KvrunError):
    """The Hub wants a licence accepted or a token."""

    exit_code = 4


class ModelError(KvrunError):
    """The model's files are broken, hostile or of a kind that kvrun does not know."""

    exit_code = 5


class OutOfMemoryError(KvrunError):
    """What was asked for does not fit into memory."""

    exit_code = 6


class ContextFullError(KvrunError):
    """The prompt or the conversation does not fit into n_ctx. what: the message without its advice."""

    exit_code = 7

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(f"{what}; {advice}" if advice else what)
        self.what = what


class NumericError(KvrunError):
    """The model produced NaN or Inf."""

    exit_code = 8


class StorageError(KvrunError):
    """Reading or writing a file failed."""

    exit_code = 9

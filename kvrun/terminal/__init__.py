"""The only code that writes to the terminal. `console()` is this process' console; a command configures it once."""

from kvrun.terminal.console import Console, human_bytes

__all__ = ["Console", "configure", "console", "human_bytes"]

_console: Console | None = None


def console() -> Console:
    """The console of this process."""
    global _console
    if _console is None:
        _console = Console()
    return _console


def configure(**settings: object) -> Console:
    """Replaces the console by one with these settings (see Console) and returns it."""
    global _console
    _console = Console(**settings)
    return _console

"""The command line: commands registered, errors mapped to one line and an exit code."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from collections.abc import Iterable
from typing import Annotated

import typer

from kvrun import __version__
from kvrun.cli.foreign import check_clusters, is_model, meant
from kvrun.cli.options import Command
from kvrun.errors import KvrunError, UsageError
from kvrun.terminal import console, streams, termination

_BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells have it

_COMMANDS = {
    "run": "Print one answer of MODEL.", "chat": "Talk with MODEL.", "plan": "Show what MODEL takes, before it is loaded.",
    "compare": "Show what cache formats cost, on a text of yours.", "bench": "Measure MODEL's speed by depth and format.",
    "pull": "Fetch MODEL, or what is missing of it.", "ls": "List the models on this machine.", "show": "Show what MODEL is.",
    "verify": "Check every file of MODEL.", "rm": "Delete what kvrun holds of MODEL.",
    "doctor": "Show what kvrun uses here, and why not better.", "session": ""}
"""Name, which is also that of the module and of the function or group in it, and what `kvrun --help` says."""


def command_line(names: Iterable[str] = _COMMANDS) -> typer.Typer:
    """The command line with these of its commands. Only their modules are imported."""
    app = typer.Typer(name="kvrun", callback=kvrun, add_completion=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                      context_settings={"help_option_names": ["-h", "--help"]})
    for name in names:
        command = getattr(importlib.import_module(f"kvrun.cli.{name}"), name)
        if isinstance(command, typer.Typer):
            app.add_typer(command)
        else:
            app.command(name, cls=Command, short_help=_COMMANDS[name])(command)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        console().line(f"kvrun {__version__}")
        raise typer.Exit


def kvrun(version: Annotated[bool, typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Show the version and exit.")] = False) -> None:
    """Run a language model on this machine.

    \b
    Examples:
      kvrun run smollm2-135m "Name three rivers."
      git diff | kvrun run smollm2-135m "Write a commit message for this change."
      kvrun chat smollm2-135m

    \b
    Exit codes: 0 done, 1 internal error, 2 usage, 3 not found or offline, 4 not
    authorised, 5 bad model, 6 out of memory, 7 context full, 8 NaN or Inf,
    9 input or output, 129/130/141/143 SIGHUP/SIGINT/SIGPIPE/SIGTERM.
    """


_ClickException = typer.BadParameter.__base__.__base__
"""click's base of every error of the command line; typer carries click under different names in its versions."""


def main(args: list[str] | None = None) -> int:
    """Runs the command that `args` (default: this process') name. Returns the exit code."""
    streams.guard_closed_streams()
    streams.utf8_text_streams()
    termination.install()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # nohup and shells' background jobs ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = _guarded(lambda: _dispatch(sys.argv[1:] if args is None else args))
    try:
        streams.flush_text_streams()
    except BrokenPipeError:
        code = code or _BROKEN_PIPE
    except OSError as error:
        console().error(f"cannot write to standard output: {error.strerror}")
        code = code or 9
    return code


def _dispatch(args: list[str]) -> int:
    if args[:1] == ["help"]:
        args = [*args[1:], "--help"]
    named = args[:1] if args and args[0] in _COMMANDS else _COMMANDS   # setting up all of them takes 25 ms
    if args and args[0] not in _COMMANDS and is_model(args[0]):
        raise UsageError(f"{args[0]} is a model, and no command: 'kvrun chat {args[0]}' is a conversation, 'kvrun run {args[0]} PROMPT' one answer")
    command = typer.main.get_command(command_line(named))
    if "_KVRUN_COMPLETE" in os.environ:  # asked by the shell, in the words of its completion script
        command.main(args, prog_name="kvrun", standalone_mode=False)
        return 0
    if not args:  # nothing to do, but somebody who may want to know what there is
        console().out(command.get_help(command.context_class(command, info_name="kvrun", **command.context_settings)) + "\n")
        return UsageError.exit_code
    if args[0] in named and not hasattr(leaf := command.commands[args[0]], "commands"):
        check_clusters(list(args[1:]), leaf)
    with command.make_context("kvrun", list(args)) as context:
        return command.invoke(context) or 0


def _guarded(call) -> int:
    """What `call` returns, or the exit code of what it raised, after its one line on stderr."""
    try:
        return call()
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        console().clear_progress()
        return termination.INTERRUPTED
    except termination.Terminated:
        console().clear_progress()
        return termination.exit_code()
    except BrokenPipeError:
        return _BROKEN_PIPE
    except KvrunError as error:
        return _fail(str(error), error.exit_code)
    except _ClickException as error:
        return _fail_usage(error)
    except MemoryError:
        return _fail("out of memory; use a smaller model or a smaller --n-ctx", 6)
    except OSError as error:
        where = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
        what = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror or str(error)
        return _fail(f"{what}{where}", 9)
    except Exception as error:  # noqa: BLE001 - the last line of defence: one line, never a trace unasked
        hint = "" if console().verbose else "; run it again with -v for the trace"
        return _fail(f"internal error: {type(error).__name__}: {error}{hint}", 1)


def _fail(message: str, code: int) -> int:
    if console().verbose:
        import traceback

        console().trace(traceback.format_exc())
    console().error(message)
    return code


def _fail_usage(error: Exception) -> int:
    """An error that the parser found, with the command's own help as the next step."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        console().out(error.format_message() + "\n")
        return UsageError.exit_code
    hint = f" (see '{context.command_path} --help')" if context is not None else ""
    return _fail((meant(error) or error.format_message()) + hint, error.exit_code)

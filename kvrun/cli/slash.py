"""The slash commands of chat: one table, from which /help, the nearest names and the dispatch come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvrun.cli.chat import Chat


@dataclass(frozen=True)
class SlashCommand:
    """One command. argument: how its argument is shown in /help, "" for none. call: gets the rest of the line."""

    name: str
    argument: str
    help: str
    call: Callable[[Chat, str], None]


def _help(chat: Chat, argument: str) -> None:
    for command in COMMANDS.values():
        usage = f"/{command.name} {command.argument}".rstrip()
        chat.console.report(f"{usage:<16} {command.help}")
    chat.console.report(f"{'//...':<16} a message that begins with a slash")
    chat.console.report(f"{'Ctrl-C':<16} stops the answer; at an empty prompt, twice, leaves; Ctrl-D leaves")


def _exit(chat: Chat, argument: str) -> None:
    chat.leaving = True


def _clear(chat: Chat, argument: str) -> None:
    chat.conversation.clear()
    chat.console.report("the conversation is forgotten" + ("; the system prompt stays" if chat.conversation.system else ""))


COMMANDS = {command.name: command for command in (
    SlashCommand("help", "", "this list", _help),
    SlashCommand("clear", "", "forget the conversation", _clear),
    SlashCommand("exit", "", "leave", _exit),
)}


def dispatch(chat: Chat, line: str) -> None:
    """Carries out `line`, which begins with a slash; for an unknown or misused command says so and does nothing."""
    name, _, argument = line[1:].partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = get_close_matches(name.lower(), COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean /{near[0]}?" if near else "/help lists them"
        chat.console.report(f"/{name}: no such command; {hint} (// begins a message with a slash)")
    elif argument.strip() and not command.argument:
        chat.console.report(f"/{name} takes no argument")
    else:
        command.call(chat, argument.strip())

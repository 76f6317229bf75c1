"""The slash commands of chat: one table, from which /help, completion, the nearest names and the dispatch come."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from kvrun.cli.options import SAMPLER_RANGES
from kvrun.errors import UsageError

if TYPE_CHECKING:
    from kvrun.cli.chat_loop import Chat


@dataclass(frozen=True)
class SlashCommand:
    """One command. argument: how its argument is shown in /help, "" for none, in brackets where it may be left out.
    call: gets the rest of the line. choices: what Tab offers for the argument."""

    name: str
    argument: str
    help: str
    call: Callable[[Chat, str], None]
    choices: Callable[[Chat, str], Iterator[str]] | None = None


def _help(chat: Chat, argument: str) -> None:
    rows = [(f"/{command.name} {command.argument}", command.help) for command in COMMANDS.values()]
    rows += [("//...", "a message that begins with a slash"),
             ("Alt-Enter, Ctrl-J", "a new line in the message; Tab completes commands and paths"),
             ("Ctrl-C", "stops the answer; at an empty prompt, twice, leaves, as Ctrl-D does")]
    for usage, what in rows:
        chat.console.report(f"{usage:<20} {what}", indent=21)


def _exit(chat: Chat, argument: str) -> None:
    chat.leaving = True


def _clear(chat: Chat, argument: str) -> None:
    kept = f"; it stays in session {chat.session.name}" if chat.session.document and chat.kept else ""
    chat.conversation.clear()
    chat.attached = []
    chat.switch(chat.store.new())
    chat.console.report("the conversation is forgotten" + kept + ("; the system prompt stays" if chat.conversation.system else ""))


def _undo(chat: Chat, argument: str) -> None:
    n = _number(argument or "1", "/undo")
    taken = chat.conversation.undo(n)
    if not taken:
        raise UsageError("there is no turn to take back")
    chat.save()
    left = len(chat.conversation.turns)
    chat.console.report(f"took back {_turns(len(taken))}, {_turns(left)} left")


def _regen(chat: Chat, argument: str) -> None:
    turn = _last_turn(chat)
    if chat.sampler.temperature > 0:
        chat.sampler = replace(chat.sampler, seed=(chat.sampler.seed + 1) % 2**64)
    else:
        chat.console.report("at temperature 0 the answer is the same; /set temp 0.8 makes others")
    chat.take_again(turn)


def _edit(chat: Chat, argument: str) -> None:
    if not argument and not chat.on_terminal:
        raise UsageError("/edit needs the new message where there is no terminal to edit it on")
    turn = _last_turn(chat)
    if argument:
        chat.take_turn(argument)
    else:
        chat.draft = turn.user
        chat.save()


def _last_turn(chat: Chat):
    taken = chat.conversation.undo()
    if not taken:
        raise UsageError("there is no turn yet")
    return taken[0]


def _system(chat: Chat, argument: str) -> None:
    if not argument:
        chat.console.report(f"system prompt: {chat.conversation.system}" if chat.conversation.system else "no system prompt")
        return
    chat.conversation.change_system(argument)
    chat.console.report("the system prompt is changed" + ("; the conversation is read again with the next message" if chat.conversation.turns else ""))


# setting -> (field of the sampler, its type, the least, the most)
_SETTINGS = {"temp" if field == "temperature" else field.replace("_", "-"): (field, *bounds) for field, bounds in SAMPLER_RANGES.items()}
_SETTINGS["seed"] = ("seed", int, 0, 2**64 - 1)


def _set(chat: Chat, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if name and name not in (*_SETTINGS, "max-tokens"):
        near = get_close_matches(name, [*_SETTINGS, "max-tokens"], n=1)
        raise UsageError(f"/set {name}: no such setting; " + (f"did you mean {near[0]}?" if near else "/set alone lists them"))
    if value and name == "max-tokens":
        chat.max_tokens = None if value == "none" else _number(value, "/set max-tokens")
    elif value:
        field, kind, least, most = _SETTINGS[name]
        try:
            number = kind(value)
        except ValueError:
            number = None
        if number is None or not least <= number <= most:
            raise UsageError(f"/set {name} {value}: give {'a whole number' if kind is int else 'a number'} from {least:g} to {most:g}")
        chat.sampler = replace(chat.sampler, **{field: number})
    shown = {key: getattr(chat.sampler, field) for key, (field, *_) in _SETTINGS.items()} | {"max-tokens": chat.max_tokens or "none"}
    for key, current in shown.items():
        if not name or key == name:
            chat.console.report(f"{key:<15} {current}")


def _read(chat: Chat, argument: str) -> None:
    from kvrun.cli.prompt import read_file

    path = _path(argument)
    if path is None:
        raise UsageError(f"/read {argument}: no such file")
    text = read_file(path)
    if not text.strip():
        raise UsageError(f"{path} is empty")
    chat.attached.append((path.name, text.rstrip("\n")))
    chat.console.report(f"{path}: {len(text.encode())} bytes, read before your next message; /clear forgets them")


def _check_kept(chat: Chat) -> None:
    if not chat.kept:
        raise UsageError("this chat leaves nothing behind, and no session can be opened or saved in it; begin one without --no-save")


def _save(chat: Chat, argument: str) -> None:
    _check_kept(chat)
    if argument and argument != chat.session.name:
        session = chat.store.open(argument)
        if session.read():
            session.close()
            raise UsageError(f"there is a session {argument} already; choose another name, or 'kvrun session rm {argument}' first")
        chat.saved.move_to(session)
        chat.session.close()
        chat.session = session
    chat.save()
    chat.console.report(f"saved as session {chat.session.name}: 'kvrun chat --session {chat.session.name}' goes on with it")


def _load(chat: Chat, argument: str) -> None:
    _check_kept(chat)
    if argument == chat.session.name:
        raise UsageError(f"session {argument} is open here")
    chat.store.info(argument)
    session = chat.store.open(argument)
    try:
        session.read()
    except BaseException:
        session.close()
        raise
    chat.switch(session)


def _context(chat: Chat, argument: str) -> None:
    engine = chat.engine
    chat.console.report(chat.status())
    known = chat.conversation.n_tokens
    said = len(engine.tokens) if known is None else known
    dropped = min(said, len(engine.tokens)) - chat.held
    system = f", system prompt of {len(chat.conversation.system)} characters" if chat.conversation.system else ""
    chat.console.report(f"{_turns(len(chat.conversation.turns))}{system}, {said} tokens read and said"
                        + (f", {dropped} of them no longer in the cache" if dropped > 0 else ""))
    before = 0
    for number, turn in enumerate(chat.conversation.turns, 1):
        read = len(turn.read) - before if turn.read else 0
        chat.console.report(f"{number:>4}  {read:>6} read {len(turn.said):>6} said  {_short(turn.user)}")
        before = len(turn.read) + len(turn.said)


def _stats(chat: Chat, argument: str) -> None:
    if argument:
        chat.stats = _choice(argument, ("on", "off"), "/stats") == "on"
        return
    chat.report_stats()


def _think(chat: Chat, argument: str) -> None:
    if argument:
        chat.think = _choice(argument, ("show", "hide"), "/think")
    chat.console.report(f"reasoning: {chat.think}")


def _copy(chat: Chat, argument: str) -> None:
    if not chat.conversation.turns:
        raise UsageError("there is no answer yet")
    text = chat.conversation.turns[-1].assistant.strip()
    if not chat.console.copy(text):
        raise UsageError("/copy needs a terminal")
    chat.console.report(f"{len(text)} characters given to the terminal's clipboard (some terminals must be told to allow it)")


# ---- helpers ----


def _number(text: str, what: str) -> int:
    if not text.isascii() or not text.isdigit() or not text.strip("0") or len(text) > 18:
        raise UsageError(f"{what} {_short(text)}: give a whole number from 1 on")
    return int(text)


def _path(text: str) -> Path | None:
    """The path that was typed, ~ and ~USER replaced. None for what can be none."""
    try:
        return None if "\0" in text else Path(text).expanduser()
    except RuntimeError:  # ~ of a user that there is not
        return None


def _choice(text: str, choices: tuple[str, ...], what: str) -> str:
    if text not in choices:
        raise UsageError(f"{what} {text}: give {' or '.join(choices)}")
    return text


def _turns(n: int) -> str:
    return f"{n} {'turn' if n == 1 else 'turns'}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 50 else line[:49] + "…"


def _paths(chat: Chat, begun: str) -> Iterator[str]:
    folder, _, name = begun.rpartition("/")
    where = _path(folder + "/" if folder or begun.startswith("/") else ".")
    try:
        for entry in sorted(os.scandir(where) if where else (), key=lambda entry: entry.name):
            if entry.name.startswith(name) and (name or not entry.name.startswith(".")):
                yield begun[: len(begun) - len(name)] + entry.name + ("/" if entry.is_dir() else "")
    except OSError:
        return


def _sessions(chat: Chat, begun: str) -> Iterator[str]:
    return (info.name for info in chat.store if info.name.startswith(begun))


def _words(*words: str) -> Callable[[Chat, str], Iterator[str]]:
    return lambda chat, begun: (word for word in words if word.startswith(begun))


COMMANDS = {command.name: command for command in (
    SlashCommand("help", "", "this list", _help),
    SlashCommand("undo", "[N]", "take back the last turn, or the last N; nothing is read again", _undo),
    SlashCommand("regen", "", "another answer to the last message", _regen),
    SlashCommand("edit", "[TEXT]", "take back the last turn and edit its message, or put TEXT in its place", _edit),
    SlashCommand("clear", "", "forget the conversation and begin a new session", _clear),
    SlashCommand("system", "[TEXT]", "show or change the system prompt", _system),
    SlashCommand("set", "[NAME [VALUE]]", "show or change temp, top-p, top-k, min-p, repeat-penalty, seed, max-tokens", _set,
                 _words(*_SETTINGS, "max-tokens")),
    SlashCommand("read", "FILE", "put a file before the next message", _read, _paths),
    SlashCommand("save", "[NAME]", "save the session, under another name if one is given, and go on in it", _save),
    SlashCommand("load", "NAME", "go on with another session", _load, _sessions),
    SlashCommand("context", "", "what is in the context, turn by turn", _context),
    SlashCommand("stats", "[on|off]", "counts and speeds of the last answer; on: of every answer", _stats, _words("on", "off")),
    SlashCommand("think", "[show|hide]", "show or hide reasoning", _think, _words("show", "hide")),
    SlashCommand("copy", "", "the last answer to the clipboard", _copy),
    SlashCommand("exit", "", "leave", _exit),
)}


_ELSEWHERE = {"bye": "exit", "quit": "exit", "q": "exit", "?": "help", "new": "clear", "reset": "clear", "retry": "regen"}
"""What other tools call it."""


def dispatch(chat: Chat, line: str) -> None:
    """Carries out `line`, which begins with a slash; for an unknown or misused command says so and does nothing."""
    name, _, argument = line[1:].partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = [_ELSEWHERE[name]] if name in _ELSEWHERE else get_close_matches(name.lower(), COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean /{near[0]}?" if near else "/help lists them"
        chat.console.report(f"/{name}: no such command; {hint} (// begins a message with a slash)")
    elif argument.strip() and not command.argument:
        chat.console.report(f"/{name} takes no argument")
    elif not argument.strip() and command.argument and not command.argument.startswith("["):
        chat.console.report(f"/{name} needs {command.argument}")
    else:
        command.call(chat, argument.strip())


def completions(chat: Chat, before: str) -> Iterator[tuple[str, int]]:
    """What Tab offers after `before`: (text, how many characters it replaces)."""
    if not before.startswith("/") or before.startswith("//") or "\n" in before:
        return
    name, space, argument = before[1:].partition(" ")
    if not space:
        for command in COMMANDS.values():
            if command.name.startswith(name):
                yield f"/{command.name}" + (" " if command.argument else ""), len(before)
        return
    command = COMMANDS.get(name)
    if command is not None and command.choices is not None:
        for choice in command.choices(chat, argument):
            yield choice, len(argument)

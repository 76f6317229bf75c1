"""kvrun session: the conversations on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kvrun.cli import options as opt
from kvrun.errors import StorageError

_HELP = """List, show, remove or export saved conversations.

\b
Examples:
  kvrun session ls
  kvrun session export thesis > thesis.md
  kvrun chat --session thesis
"""
session = typer.Typer(name="session", help=_HELP, short_help="List, show, remove or export saved conversations.", rich_markup_mode=None, add_completion=False,
                      no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False, autocompletion=opt.complete_session, help="A session; 'kvrun session ls' lists them.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@session.command("ls", cls=opt.Command)
def list_(json: Json = False, color: opt.Color = "auto", verbose: opt.Verbose = False) -> None:
    """List the sessions, the one used last first.

    \b
    Examples:
      kvrun session ls
      kvrun session ls --json
      kvrun session ls --json | jq -r '.[].name'
    """
    from kvrun.cache.session import SessionStore
    from kvrun.cli.ls import table
    from kvrun.terminal import human_bytes

    console = opt.configure_console(opt.OutputOptions(color=color, verbose=verbose))
    infos = list(SessionStore())
    if json:
        from kvrun.cli.report import as_json

        console.out(as_json([_described(info) for info in infos]))
        return
    if not infos:
        console.notice("no sessions on this machine yet; 'kvrun chat' begins one")
        return
    rows = []
    for info in infos:
        facts = _described(info)
        what = ("", "", "damaged") if info.damaged else (str(facts["turns"]), str(facts["tokens"]), facts["model"] + ("" if facts["cache"] else ", text only"))
        rows.append((info.name, time.strftime("%Y-%m-%d %H:%M", time.localtime(info.used)), human_bytes(info.n_bytes), *what))
    for line in table(("NAME", "LAST USED", "SIZE", "TURNS", "TOKENS", "MODEL"), rows):
        console.row(line)


def _described(info) -> dict[str, Any]:
    document = info.document
    return {"name": info.name, "used": info.used, "bytes": info.n_bytes, "damaged": info.damaged, "model": document.get("model", {}).get("name"),
            "kv": document.get("model", {}).get("kv"), "n_ctx": document.get("model", {}).get("n_ctx"),
            "turns": len(document.get("turns", ())), "tokens": len(document.get("tokens", ())), "cache": bool(document.get("marks"))}


@session.command(cls=opt.Command)
def show(name: Name, json: Json = False, color: opt.Color = "auto", verbose: opt.Verbose = False) -> None:
    """Show one session: its model, its size, its turns.

    \b
    Examples:
      kvrun session show thesis
      kvrun session show thesis --json
      kvrun session show thesis --json | jq -r .messages[-1].content
    """
    from kvrun.cache.session import SessionStore, read_document
    from kvrun.terminal import human_bytes

    console = opt.configure_console(opt.OutputOptions(color=color, verbose=verbose))
    store = SessionStore()
    info = store.info(name)
    read_document(store.root / name)  # a damaged one is an error here
    if json:
        from kvrun.cli.report import as_json

        console.out(as_json(_described(info) | {"system": info.document["system"], "messages": messages(info.document)}))
        return
    model = info.document["model"]
    console.line(f"session  {info.name}, {human_bytes(info.n_bytes)}, {human_bytes(info.page_bytes)} of it cache")
    console.line(f"model    {model['name']}, cache {model['kv']}, context {model['n_ctx']}, {len(info.document['tokens'])} tokens held")
    if info.document["system"]:
        console.line(f"system   {info.document['system']}")
    for number, turn in enumerate(info.document["turns"], 1):
        console.line(f"{number:>4}  {' '.join(turn['user'].split())[:70]}")


def messages(document: dict[str, Any]) -> list[dict[str, str]]:
    """A session's conversation in the form that chat templates and chat APIs take."""
    head = [{"role": "system", "content": document["system"]}] if document["system"] else []
    return head + [{"role": role, "content": turn[role]} for turn in document["turns"] for role in ("user", "assistant")]


@session.command(cls=opt.Command)
def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", show_default=False, autocompletion=opt.complete_session, help="Sessions to remove.")],
    color: opt.Color = "auto", verbose: opt.Verbose = False,
) -> None:
    """Remove sessions, conversation and cache.

    \b
    Examples:
      kvrun session rm thesis
      kvrun session rm 2026-11-22-101500 2026-11-22-111500
      kvrun session rm old-1 old-2 && kvrun session ls
    """
    from kvrun.cache.session import SessionStore
    from kvrun.terminal import human_bytes

    console = opt.configure_console(opt.OutputOptions(color=color, verbose=verbose))
    store = SessionStore()
    infos = [store.info(name) for name in dict.fromkeys(names)]
    for info in infos:
        store.remove(info.name)
        console.line(f"removed session {info.name} ({human_bytes(info.n_bytes)})")


@session.command(cls=opt.Command)
def export(
    name: Name,
    format: Annotated[Literal["markdown", "json"], typer.Option("--format", help="markdown to read, json for programs.")] = "markdown",
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", show_default=False, help="Where to. Default: standard output.")] = None,
    color: opt.Color = "auto", verbose: opt.Verbose = False,
) -> None:
    """Write a session's conversation out.

    \b
    Examples:
      kvrun session export thesis > thesis.md
      kvrun session export thesis --format json | jq .messages[-1].content
      kvrun session export thesis -o thesis.md
    """
    from kvrun.cache.session import SessionStore, read_document
    from kvrun.cli.report import as_json

    console = opt.configure_console(opt.OutputOptions(color=color, verbose=verbose))
    store = SessionStore()
    store.info(name)
    document = read_document(store.root / name)
    if format == "json":
        text = as_json({"name": name, "model": document["model"]["name"], "messages": messages(document)})
    else:
        text = f"# {name}\n\nModel: {document['model']['name']}\n" + "".join(
            f"\n## {message['role'].capitalize()}\n\n{message['content'].strip()}\n" for message in messages(document))
    if output is None:
        console.line(text.removesuffix("\n"))
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{output}: {error.strerror}") from error

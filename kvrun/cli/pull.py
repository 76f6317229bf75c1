"""kvrun pull: fetch a model, or what changed of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from kvrun.cli import options as opt

if TYPE_CHECKING:
    from kvrun.hub.files import Progress
    from kvrun.terminal import Console


@dataclass(frozen=True)
class PullOptions:
    """What `kvrun pull` was asked for."""

    model: str
    revision: str | None
    json: bool


def pull(
    model: Annotated[str, typer.Argument(metavar="MODEL", show_default=False, help="An alias of models.toml, org/name[@revision], or org/name/file.gguf.")],
    revision: opt.Revision = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object: name, path, bytes, revision.")] = False,
    color: opt.Color = "auto",
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Fetch MODEL, or what is missing, outdated or damaged of it, and check every checksum.

    What arrived before an interruption is kept. Hub models go to the cache that all Hugging Face tools share.

    \b
    Examples:
      kvrun pull smollm2-135m
      kvrun pull Qwen/Qwen3-0.6B
      kvrun pull org/name@v1.0
    """
    console = opt.configure_console(opt.OutputOptions(color=color, quiet=quiet, verbose=verbose))
    _pull(PullOptions(model, revision, json), console)


def _pull(options: PullOptions, console: Console) -> None:
    from kvrun.hub.pull import pull as fetch
    from kvrun.terminal import human_bytes, termination

    try:
        with termination.raising():
            files = fetch(options.model, revision=options.revision, progress=transfer_progress(console))
    finally:
        console.clear_progress()
    if files.licence:
        console.notice(f"{files.name} comes under: {files.licence}")
    size = sum(p.stat().st_size for p in ([files.path] if files.kind == "gguf" else files.path.rglob("*")) if p.is_file())
    if options.json:
        from kvrun.cli.report import as_json

        console.out(as_json({"name": files.name, "path": str(files.path), "bytes": size, "source": files.source,
                             "revision": files.revision, "licence": files.licence}))
        return
    console.line(f"{files.name}  {human_bytes(size)}  {files.path}")


def transfer_progress(console: Console) -> Progress:
    """A progress callback in bytes: a live line on a terminal, else one plain line per step."""
    said: set[str] = set()

    def report(what: str, done: int, total: int | None) -> None:
        if console.stderr_is_terminal:
            console.progress(what, done, total, unit="B")
        elif what not in said:
            from kvrun.terminal import human_bytes

            said.add(what)
            console.notice(f"{what} ({human_bytes(total)})" if total else what)

    return report

"""kvrun rm: delete a fetched model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from kvrun.cli import options as opt
from kvrun.errors import UsageError

if TYPE_CHECKING:
    from kvrun.terminal import Console


@dataclass(frozen=True)
class RmOptions:
    """What `kvrun rm` was asked for. yes: do not ask."""

    model: str
    revision: str | None
    yes: bool
    json: bool


def rm(
    model: Annotated[str, typer.Argument(metavar="MODEL", show_default=False, help="An alias of models.toml, org/name[@revision], or a folder or file of your own.")],
    revision: opt.Revision = None,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON list of what was removed.")] = False,
    color: opt.Color = "auto",
    verbose: opt.Verbose = False,
) -> None:
    """Delete what kvrun's store and the shared Hugging Face cache hold of MODEL, and its weights as they were quantized here.

    Asks first, on a terminal; elsewhere --yes is needed. Your own folders and files are never touched: of those only
    the quantized weights go.

    \b
    Examples:
      kvrun rm smollm2-135m
      kvrun rm Qwen/Qwen3-0.6B --yes
      kvrun rm Qwen/Qwen3-0.6B --revision v1 --yes --json
    """
    console = opt.configure_console(opt.OutputOptions(color=color, verbose=verbose))
    _rm(RmOptions(model, revision, yes, json), console)


def _rm(options: RmOptions, console: Console) -> None:
    from kvrun.hub.pull import removals, remove
    from kvrun.terminal import human_bytes

    found = removals(options.model, options.revision)
    if not options.yes:
        if not sys.stdin or not sys.stdin.isatty():
            raise UsageError("rm: nobody to ask; say --yes")
        what = ", ".join(f"{r.path} ({human_bytes(r.n_bytes)})" for r in found)
        if not typer.confirm(f"Delete {what}?", err=True):
            raise typer.Exit(1)
    for r in found:
        remove(r)
    if options.json:
        from kvrun.cli.report import as_json

        console.out(as_json([{"path": str(r.path), "bytes": r.n_bytes} for r in found]))
        return
    for r in found:
        console.line(f"removed {r.path} ({human_bytes(r.n_bytes)})")
    if len(found) > 1:
        console.line(f"{human_bytes(sum(r.n_bytes for r in found))} in all")

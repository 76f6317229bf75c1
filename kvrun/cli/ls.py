"""kvrun ls: the models on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from kvrun.cli import options as opt

if TYPE_CHECKING:
    from kvrun.terminal import Console


@dataclass(frozen=True)
class LsOptions:
    """What `kvrun ls` was asked for. aliases: list the names of models.toml instead of what is here."""

    aliases: bool
    json: bool


def ls(
    aliases: Annotated[bool, typer.Option("--aliases", help="List every name of models.toml, fetched or not.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
    color: opt.Color = "auto",
    verbose: opt.Verbose = False,
) -> None:
    """List the models on this machine: kvrun's own store and the cache that Hugging Face tools share.

    \b
    Examples:
      kvrun ls
      kvrun ls --aliases
      kvrun ls --json | jq -r '.[].name'
    """
    _ls(LsOptions(aliases, json), opt.configure_console(opt.OutputOptions(color=color, verbose=verbose)))


def _ls(options: LsOptions, console: Console) -> None:
    from kvrun.hub import load_catalog
    from kvrun.hub.facts import local_models
    from kvrun.terminal import human_bytes

    catalog = load_catalog()
    if options.aliases:
        rows = [{"name": a.name, "repo": a.repo, "path": a.path, "package": bool(a.package), "gated": a.gated,
                 "licence": a.licence, "description": a.description, "default": a.name == catalog.default}
                for a in catalog.aliases.values()]
        header = ("NAME", "FROM", "DESCRIPTION", "LICENCE")
        cells = [(r["name"], r["repo"] or r["path"] or "package", r["description"], r["licence"] or "") for r in rows]
    else:
        models = local_models(catalog)
        rows = [asdict(m) for m in models]
        header = ("NAME", "SIZE", "FORMAT", "SOURCE", "ALIAS")
        cells = [(m.name, human_bytes(m.n_bytes), m.format, m.source, ", ".join(a for a in m.aliases if a != m.name))
                 for m in models]
    if options.json:
        from kvrun.cli.report import as_json

        console.out(as_json(rows))
        return
    if not cells:
        console.notice("no models on this machine yet; 'kvrun pull NAME' fetches one, 'kvrun ls --aliases' lists names")
        return
    for line in table(header, cells):
        console.row(line)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their widest cell, two spaces apart."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in [header, *rows]]

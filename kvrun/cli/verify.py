"""kvrun verify: is every file of a model what it should be?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from kvrun.cli import options as opt

if TYPE_CHECKING:
    from kvrun.terminal import Console


@dataclass(frozen=True)
class VerifyOptions:
    """What `kvrun verify` was asked for."""

    model: str
    revision: str | None
    json: bool


def verify(
    model: opt.Model,
    revision: opt.Revision = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    color: opt.Color = "auto",
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Check every file of MODEL on this machine: checksums, structure, and no NaN or Inf in the weights.

    Opens no connection. Exit code 5 names the first file or tensor that is wrong; `kvrun pull` fetches it again.

    \b
    Examples:
      kvrun verify smollm2-135m
      kvrun verify ./my-model --json
      kvrun verify gemma3-270m -q && echo whole
    """
    console = opt.configure_console(opt.OutputOptions(color=color, quiet=quiet, verbose=verbose))
    _verify(VerifyOptions(model, revision, json), console)


def _verify(options: VerifyOptions, console: Console) -> None:
    from kvrun import hub
    from kvrun.cli.pull import transfer_progress
    from kvrun.hub.verify import expected_sha256, verify as check
    from kvrun.terminal import human_bytes

    files = hub.resolve(options.model, revision=options.revision, offline=True)
    try:
        checked = check(files, expected_sha256(files), transfer_progress(console))
    finally:
        console.clear_progress()
    if options.json:
        from kvrun.cli.report import as_json

        console.out(as_json({"name": files.name, "path": str(files.path), "ok": True,
                             "files": [asdict(c) for c in checked]}))
        return
    for c in checked:
        console.line(f"{c.checksum:<5} {human_bytes(c.n_bytes):>10}  {c.file}")
    console.line(f"{files.name}: good" + ("" if any(c.checksum == "ok" for c in checked)
                                          else " (nothing says what its checksums should be)"))

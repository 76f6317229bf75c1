"""kvrun plan: what a model takes, before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvrun.cli import options as opt
from kvrun.errors import OutOfMemoryError, UsageError

if TYPE_CHECKING:
    from kvrun.blueprint import Blueprint
    from kvrun.terminal import Console

_FIRST_N_CTX = 1024


@dataclass(frozen=True)
class PlanOptions:
    """What `kvrun plan` was asked for. headroom: per cent of the available memory to leave alone."""

    model: opt.ModelOptions
    headroom: float
    json: bool


def plan(
    model: opt.Model,
    n_ctx: opt.NCtx = None,
    kv: Annotated[str, typer.Option("--kv", metavar="FORMAT", autocompletion=opt.complete_kv, help="Cache format of the detailed part; the table has all.")] = "f16",
    weights: opt.Weights = "auto",
    headroom: opt.Headroom = 10,
    device: opt.DeviceOption = "auto",
    threads: opt.Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    revision: opt.Revision = None,
    offline: opt.Offline = False,
    color: opt.Color = "auto",
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show what MODEL takes: bytes of weights, cache and workspace, what fits here, and how fast it may be.

    Reads headers only. MODEL may be a folder that holds nothing but config.json; of a Hub repository that is not
    here, only that file is fetched. Expected tokens/s is the measured speed of reading memory, divided by the bytes
    that a token needs at that depth: a ceiling. Bytes are those that run and chat will allocate.

    \b
    Examples:
      kvrun plan smollm2-135m
      kvrun plan gemma3-270m -n 32768 --kv f32
      kvrun plan ./my-model --headroom 25 --json
    """
    console = opt.configure_console(opt.OutputOptions(color=color, quiet=quiet, verbose=verbose))
    _plan(PlanOptions(opt.ModelOptions(model, n_ctx, kv, device, threads, revision, offline, weights=weights), headroom, json), console)


def _plan(options: PlanOptions, console: Console) -> None:
    from kvrun.blueprint import Blueprint, Shape
    from kvrun.runtime import choose_device

    wanted = options.model
    device = choose_device(wanted.device, console.notice)
    files = opt.resolve_model(wanted, console, weights=False)
    with Blueprint(files, Shape(device, wanted.threads, weights=wanted.weights)) as blueprint:
        report = survey(blueprint, wanted.n_ctx, wanted.kv, options.headroom)
    if options.json:
        from kvrun.cli.report import as_json

        console.out(as_json(report))
        return
    about, *rows = lines(report)
    console.prose(about)
    for row in rows:
        console.line(row)


def survey(blueprint: Blueprint, wanted: int | str | None, kv: str, headroom: float) -> dict[str, Any]:
    """The whole plan as data; see --json. headroom: per cent."""
    from kvrun.cache.formats import KV_CHOICES
    from kvrun.cache.planner import attended_bytes, largest_n_ctx, token_bytes, usable
    from kvrun.measure.bandwidth import read_bandwidth

    available = blueprint.available()
    limit = usable(available, headroom / 100)
    trained = blueprint.spec.n_positions
    try:
        n_ctx = blueprint.choose_n_ctx(wanted, kv, headroom / 100)
    except OutOfMemoryError:  # "max", and nothing fits: that is what the plan is to show
        n_ctx = min(_FIRST_N_CTX, trained)
    speed = read_bandwidth(blueprint.threads) if blueprint.shape.device == "cpu" else None
    groups = blueprint.plan(n_ctx).groups

    def fits(total: int) -> bool | None:
        return None if limit is None else total <= limit

    def rate(kv: str, n: int) -> float | None:
        moved = blueprint.read_bytes + attended_bytes(groups, blueprint.layouts(kv, n), n)
        return None if speed is None else speed / moved

    def row(kv: str, n: int) -> dict[str, Any]:
        memory = blueprint.memory(kv, n)
        return {"n_ctx": n, "kv": kv, "cache_bytes": memory.cache, "workspace_bytes": memory.workspace,
                "total_bytes": memory.total, "fits": fits(memory.total), "tokens_per_second": rate(kv, n)}

    formats = [k for k in KV_CHOICES if _built(blueprint, k)]
    layouts = blueprint.layouts(kv, n_ctx)
    chosen = blueprint.memory(kv, n_ctx)
    return {
        "model": blueprint.files.name, "device": blueprint.shape.device, "threads": blueprint.threads, "kv": kv, "n_ctx": n_ctx,
        "trained_n_ctx": trained, "available_bytes": available, "headroom_percent": headroom, "usable_bytes": limit,
        "read_bytes_per_second": speed,
        "weights_bytes": chosen.weights, "cache_bytes": chosen.cache, "workspace_bytes": chosen.workspace,
        "program_bytes": chosen.program, "total_bytes": chosen.total, "fits": fits(chosen.total), "tokens_per_second": rate(kv, n_ctx),
        "bytes_per_token": token_bytes(layouts),
        "groups": [{"layers": len(g.layers), "window": g.window, "pages": layout.n_pages, "cache_bytes": layout.n_bytes,
                    "bytes_per_token": token_bytes([layout])} for g, layout in zip(groups, layouts, strict=True)],
        "largest_n_ctx": {k: trained if limit is None else largest_n_ctx(blueprint.planner(k), limit, trained) for k in formats},
        "table": [row(k, n) for n in _lengths(trained, n_ctx) for k in formats],
    }


def _built(blueprint: Blueprint, kv: str) -> bool:
    """Whether this model can have its cache in this format."""
    try:
        blueprint.formats(kv)
    except UsageError:
        return False
    return True


def _lengths(trained: int, n_ctx: int) -> list[int]:
    """1k, 2k, 4k, ... up to the trained length, with that and n_ctx among them."""
    lengths = {n_ctx, trained}
    n = _FIRST_N_CTX
    while n < trained:
        lengths.add(n)
        n *= 2
    return sorted(lengths)


def lines(report: dict[str, Any]) -> list[str]:
    """The plan for people."""
    from kvrun.terminal import human_bytes

    free = report["available_bytes"]
    room = "unknown memory" if free is None else (f"{human_bytes(free)} available, {human_bytes(report['usable_bytes'])} "
                                                  f"of it usable with {report['headroom_percent']:g} % headroom")
    threads = report["threads"]
    out = [f"{report['model']} on {report['device']}, {threads} thread{'s' * (threads > 1)}: {room}", "",
           f"n_ctx {report['n_ctx']}, cache {report['kv']}",
           f"  weights    {human_bytes(report['weights_bytes']):>10}"]
    for g in report["groups"]:
        seen = f"a window of {g['window']}" if g["window"] else "full attention"
        out.append(f"  cache      {human_bytes(g['cache_bytes']):>10}   {g['layers']} layer{'s' * (g['layers'] > 1)} of {seen}: {g['pages']} pages, "
                   f"{human_bytes(g['bytes_per_token'])} a token")
    if len(report["groups"]) > 1:
        out.append(f"  all cache  {human_bytes(report['cache_bytes']):>10}   {human_bytes(report['bytes_per_token'])} a token")
    out += [f"  workspace  {human_bytes(report['workspace_bytes']):>10}",
            *([f"  program    {human_bytes(report['program_bytes']):>10}   Python, libraries, tokenizer: an estimate"] if report["program_bytes"] else []),
            f"  total      {human_bytes(report['total_bytes']):>10}   {_verdict(report['fits'])}", ""]
    formats = list(report["largest_n_ctx"])
    cells = {(row["n_ctx"], row["kv"]): row for row in report["table"]}
    lengths = sorted({n for n, _ in cells})

    def table(title: str, cell) -> list[str]:
        head = f"{'n_ctx':>8}" + "".join(f"{kv:>14}" for kv in formats)
        return [title, head, *(f"{n:>8}" + "".join(f"{cell(cells[n, kv]):>14}" for kv in formats) for n in lengths)]

    out += table("bytes in all, and whether they fit",
                 lambda row: human_bytes(row["total_bytes"]) + ("" if row["fits"] is None else "  ok" if row["fits"] else "  no"))
    out.append(f"{'largest':>8}" + "".join(f"{report['largest_n_ctx'][kv] or 'none':>14}" for kv in formats))
    if report["read_bytes_per_second"]:
        out += ["", *table(f"tokens/s at that depth, at most: memory is read at {report['read_bytes_per_second'] / 1e9:.1f} GB/s",
                           lambda row: f"{row['tokens_per_second']:.3g}")]
    return out


def _verdict(fits: bool | None) -> str:
    return "" if fits is None else "fits" if fits else "does not fit"

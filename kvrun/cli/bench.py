"""kvrun bench: prefill and decode at several depths and cache formats."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvrun.cli import options as opt
from kvrun.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvrun.measure.speed import Speed
    from kvrun.terminal import Console

DEFAULT_DEPTHS = (0, 1024, 4096, 16384)
_HEAD = f"{'kv':<10}{'depth':>7}{'prefill tok/s':>15}{'decode ms':>11}{'tok/s':>9}{'MiB/token':>11}{'of bandwidth':>14}"


@dataclass(frozen=True)
class BenchOptions:
    """What `kvrun bench` was asked for. depths: None for those of DEFAULT_DEPTHS that the model reaches."""

    model: opt.ModelOptions
    kvs: tuple[str, ...]
    depths: tuple[int, ...] | None
    repeat: int
    random: bool
    no_cache: bool
    json: bool


def bench(
    model: opt.Model,
    kv: Annotated[str, typer.Option("--kv", metavar="FORMAT,...", help="Cache formats; they take turns.")] = "f16",
    weights: opt.Weights = "auto",
    depth: Annotated[str | None, typer.Option(
        "--depth", metavar="N,...", show_default=False,
        help="Tokens in the cache. Default: 0,1024,4096,16384, as far as the model was trained for.")] = None,
    repeat: Annotated[int, typer.Option("--repeat", metavar="N", min=1, max=1000, help="Rounds; the median counts.")] = 5,
    no_cache: Annotated[bool, typer.Option(
        "--no-cache", help="Also compute the whole prefix for every token, to show what the cache saves.")] = False,
    random: Annotated[bool, typer.Option(
        "--random", help="Random weights of the model's shape; taken anyway when MODEL is a folder with config.json alone.")] = False,
    device: opt.DeviceOption = "auto",
    threads: opt.Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    revision: opt.Revision = None,
    offline: opt.Offline = False,
    color: opt.Color = "auto",
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Measure MODEL: prefill and decode at several depths and cache formats.

    Prefill is a chunk of up to 512 tokens behind what the cache holds. MiB/token is what a decoded token reads and
    writes, weights and cache; "of bandwidth" is that in the time it took, over how fast this machine reads memory.
    A model that fits into the processor's cache can exceed it.

    \b
    Examples:
      kvrun bench smollm2-135m
      kvrun bench smollm2-135m --kv f16,f32 --depth 0,4096 --repeat 9
      kvrun bench smollm2-135m --depth 1024 --no-cache
      kvrun bench ./my-model --random --json
    """
    console = opt.configure_console(opt.OutputOptions(color=color, quiet=quiet, verbose=verbose))
    _bench(BenchOptions(opt.ModelOptions(model, None, kv, device, threads, revision, offline, weights=weights), opt.formats(kv), _depths(depth), repeat,
                        random, no_cache, json), console)


def _depths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        depths = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--depth {text}: give numbers of tokens parted by commas, as in --depth 0,4096") from None
    if min(depths) < 0:
        raise UsageError(f"--depth {text}: must not be negative")
    return depths


def _bench(options: BenchOptions, console: Console) -> None:
    from kvrun.blueprint import DEFAULT_CHUNK, Blueprint, Shape
    from kvrun.measure.bandwidth import read_bandwidth
    from kvrun.measure.speed import measure
    from kvrun.measure.tracks import Model
    from kvrun.runtime import choose_device

    wanted = options.model
    device = choose_device(wanted.device, console.notice)
    files = opt.resolve_model(wanted, console, weights=not (options.random or Path(wanted.model).is_dir()))
    with Blueprint(files, Shape(device, wanted.threads, weights=wanted.weights)) as blueprint:
        depths = _reached(options.depths, blueprint.spec.n_positions, files.name)
        speed = read_bandwidth(blueprint.threads) if device == "cpu" else None
        random = options.random or files.kind == "config"
        about = {"model": files.name, "device": device, "threads": blueprint.threads, "random_weights": random,
                 "weights_bytes": blueprint.weight_bytes, "read_bytes_per_second": speed, "repeat": options.repeat}
        with Model(blueprint, max(depths) + DEFAULT_CHUNK, options.kvs, random=random, rewinds=DEFAULT_CHUNK,
                   report=lambda done, total: console.progress("loading", done, total, unit="B")) as model:
            measured = measure(model, depths, bandwidth=speed, repeat=options.repeat, no_cache=options.no_cache,
                               progress=lambda what, done, total: console.progress(what, done, total, unit="tokens" if total else ""))
            if options.json:
                from kvrun.cli.report import as_json

                rows = [asdict(speed) for at_depth in measured for speed in at_depth]
                console.out(as_json({**about, "rows": rows}))
                return
            _show(about, measured, options.no_cache, console)
    console.clear_progress()


def _reached(depths: tuple[int, ...] | None, trained: int, name: str) -> tuple[int, ...]:
    """The depths to measure: those asked for, or the default ones as far as the model was trained for."""
    if depths is None:
        return tuple(d for d in DEFAULT_DEPTHS if d <= trained)
    if max(depths) > trained:
        raise UsageError(f"--depth {max(depths)}: {name} was trained for {trained} positions; use at most that")
    return depths


def _show(about: dict[str, Any], measured: Iterator[list[Speed]], no_cache: bool, console: Console) -> None:
    from kvrun.terminal import human_bytes

    threads, memory = about["threads"], about["read_bytes_per_second"]
    reading = "" if memory is None else f", memory read at {memory / 1e9:.1f} GB/s"
    random = "random " if about["random_weights"] else ""
    console.prose(f"{about['model']} on {about['device']}, {threads} thread{'s' * (threads > 1)}: {random}weights of "
                  f"{human_bytes(about['weights_bytes'])}{reading}; medians of {about['repeat']}")
    console.line("")
    console.line(_HEAD + (f"{'no cache ms':>13}{'saved':>9}" if no_cache else ""))
    for at_depth in measured:
        for s in at_depth:
            share = "-" if s.bandwidth_share is None else f"{100 * s.bandwidth_share:.0f} %"
            without = f"{s.no_cache_ms_per_token:>13.1f}{s.no_cache_ms_per_token / s.ms_per_token:>8.1f}x" if s.no_cache_ms_per_token else ""
            console.line(f"{s.kv:<10}{s.depth:>7}{s.prefill_tokens_per_second:>15.0f}{s.ms_per_token:>11.2f}{s.tokens_per_second:>9.1f}"
                         f"{s.bytes_moved / 2**20:>11.1f}{share:>14}{without}")

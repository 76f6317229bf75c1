"""kvrun compare: what cache formats cost in quality, on the user's own text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvrun.cli import options as opt
from kvrun.errors import UsageError

if TYPE_CHECKING:
    from kvrun.blueprint import Blueprint
    from kvrun.measure.divergence import Comparison
    from kvrun.measure.tracks import Model
    from kvrun.terminal import Console
    from kvrun.text import Text

BASE = "f16"
DEFAULT_WINDOW = 2048
MIN_WINDOW = 64
_ROUNDS, _STEPS = 7, 4
_BACK = 48
"""Tokens before the end of a window where steps are timed: not the last, for they would fill a page, which 1 step in 128 does."""


@dataclass(frozen=True)
class CompareOptions:
    """What `kvrun compare` was asked for. kvs: formats to compare with f16."""

    model: opt.ModelOptions
    file: Path
    kvs: tuple[str, ...]
    json: bool


def compare(
    model: opt.Model,
    file: Annotated[Path, typer.Option(
        "-f", "--file", metavar="FILE", show_default=False, help="UTF-8 text to compare on; - is standard input.")],
    kv: Annotated[str | None, typer.Option(
        "--kv", metavar="FORMAT,...", show_default=False, help="Cache formats to compare with f16. Default: every other that this build has.")] = None,
    weights: opt.Weights = "auto",
    n_ctx: Annotated[int | None, typer.Option(
        "-n", "--n-ctx", metavar="N", min=MIN_WINDOW, show_default=False,
        help="Tokens of a window. Default: 2048, or the trained length or the text where that is less.")] = None,
    device: opt.DeviceOption = "auto",
    threads: opt.Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    revision: opt.Revision = None,
    offline: opt.Offline = False,
    color: opt.Color = "auto",
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show what cache formats cost in quality on a text of yours, against the f16 cache.

    The text is cut into windows of N tokens, each read from an empty cache; what is left at the end is not used. The
    second half of every window is compared, token by token: KL divergence in nats (mean, median, 99th percentile,
    largest), how often the likeliest token is the same, and the ratio of perplexities. ms/tok is decoding at the
    end of a window.

    \b
    Examples:
      kvrun compare smollm2-135m -f book.txt
      kvrun compare smollm2-135m -f book.txt --kv f32 -n 1024
      cat notes/*.md | kvrun compare gemma3-270m -f - --json
    """
    console = opt.configure_console(opt.OutputOptions(color=color, quiet=quiet, verbose=verbose))
    which = opt.ModelOptions(model, n_ctx, BASE, device, threads, revision, offline, weights=weights)
    _compare(CompareOptions(which, file, opt.formats(kv), json), console)


def _compare(options: CompareOptions, console: Console) -> None:
    from kvrun.blueprint import Blueprint, Shape
    from kvrun.cache.formats import KV_CHOICES
    from kvrun.cli.prompt import read_file, read_stdin
    from kvrun.measure.divergence import Comparison, rows_per_step
    from kvrun.measure.tracks import Model
    from kvrun.models import load_spec
    from kvrun.runtime import choose_device
    from kvrun.text import load_text

    text = read_stdin() if options.file == Path("-") else read_file(options.file)
    if not text.strip():
        raise UsageError(f"{_name(options.file)} is empty; give text to compare on")
    wanted = options.model
    device = choose_device(wanted.device, console.notice)
    files = opt.resolve_model(wanted, console)
    vocab = load_spec(files.config, str(files.path)).vocab_size
    with Blueprint(files, Shape(device, wanted.threads, max_out=rows_per_step(vocab), weights=wanted.weights)) as blueprint:
        kvs = options.kvs or tuple(kv for kv in KV_CHOICES if kv != BASE)
        for kv in kvs:
            blueprint.formats(kv)
        windows, unused = cut(load_text(files), text, wanted.n_ctx, blueprint.spec.n_positions, _name(options.file))
        n_ctx = len(windows[0])
        with Model(blueprint, n_ctx, (BASE, *kvs), report=lambda done, total: console.progress("loading", done, total, unit="B")) as opened:
            comparison = Comparison(opened.tracks)
            for i, window in enumerate(windows):
                comparison.add(window, lambda rows, i=i: console.progress("comparing", i * n_ctx + rows, len(windows) * n_ctx, unit="tokens"))
            report = _report(blueprint, opened, comparison, windows, unused)
    console.clear_progress()
    if options.json:
        from kvrun.cli.report import as_json

        console.out(as_json(report))
        return
    about, *rows = lines(report)
    console.prose(about)
    for row in rows:
        console.line(row)


def _name(file: Path) -> str:
    return "standard input" if file == Path("-") else str(file)


def cut(text: Text, words: str, window: int | None, trained: int, where: str) -> tuple[list[list[int]], int]:
    """`words` as windows of token ids, each beginning with the tokenizer's BOS where it has one, and how many tokens
    at the end make no whole window. window: None is 2048, or less where the model or the text has less."""
    front = text.encode("", bos=True)
    ids = text.encode(words, bos=False)
    if window is not None and window > trained:
        raise UsageError(f"--n-ctx {window}: the model was trained for {trained} positions; use at most that")
    size = window or min(DEFAULT_WINDOW, trained, max(len(front) + len(ids), MIN_WINDOW))
    step = size - len(front)
    if len(ids) < step:
        advice = f" or use -n {len(front) + len(ids)}" if len(front) + len(ids) >= MIN_WINDOW else ""
        raise UsageError(f"{where}: {len(ids)} tokens are too few to compare, a window needs {step}; give a longer text{advice}")
    windows = [front + ids[start : start + step] for start in range(0, len(ids) - step + 1, step)]
    return windows, len(ids) - len(windows) * step


def _report(blueprint: Blueprint, opened: Model, comparison: Comparison, windows: list[list[int]], unused: int) -> dict[str, Any]:
    from kvrun.cache.planner import token_bytes
    from kvrun.measure.divergence import decode_ms

    n_ctx = len(windows[0])
    for track in opened.tracks:
        track.rewind(n_ctx - _BACK)
    times = decode_ms(opened.tracks, windows[-1][-_BACK], rounds=_ROUNDS, steps=_STEPS)
    per_token = [token_bytes(blueprint.layouts(track.kv, n_ctx)) for track in opened.tracks]
    return {
        "model": blueprint.files.name, "device": blueprint.shape.device, "threads": blueprint.threads, "n_ctx": n_ctx,
        "windows": len(windows), "compared": comparison.rows, "unused_tokens": unused,
        "baseline": {"kv": BASE, "ppl": comparison.perplexity, "bytes_per_token": per_token[0], "ms_per_token": times[0]},
        "rows": [{**asdict(found), "bytes_per_token": size, "ms_per_token": ms}
                 for found, size, ms in zip(comparison.results(), per_token[1:], times[1:], strict=True)]}


def lines(report: dict[str, Any]) -> list[str]:
    """The comparison for people."""
    base, windows = report["baseline"], report["windows"]
    left = f", {report['unused_tokens']} tokens left over" if report["unused_tokens"] else ""
    out = [f"{report['model']} on {report['device']}: {windows} window{'s' * (windows > 1)} of {report['n_ctx']} tokens{left}; "
           f"the second half of each compared, {report['compared']} tokens", "",
           f"{'kv':<6}{'KLD mean':>9}{'median':>9}{'99 %':>9}{'max':>9}{'top-1':>9}{'PPL ratio':>11}{'B/token':>9}{'ms/tok':>8}",
           f"{base['kv']:<6}{'':>56}{base['bytes_per_token']:>9.0f}{base['ms_per_token']:>8.2f}"]
    for row in report["rows"]:
        divergences = "".join(f"{row[key]:>9.5f}" for key in ("kld_mean", "kld_median", "kld_p99", "kld_max"))
        out.append(f"{row['kv']:<6}{divergences}{100 * row['top1']:>7.2f} %{row['ppl_ratio']:>11.4f}"
                   f"{row['bytes_per_token']:>9.0f}{row['ms_per_token']:>8.2f}")
    return [*out, "", f"Perplexity with {base['kv']}: {base['ppl']:.3f}. ms/tok: one decode step behind {report['n_ctx'] - _BACK} tokens."]

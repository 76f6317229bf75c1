"""kvrun show: what a model is, without loading it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from kvrun.cli import options as opt

if TYPE_CHECKING:
    from kvrun.hub.facts import Facts
    from kvrun.terminal import Console


@dataclass(frozen=True)
class ShowOptions:
    """What `kvrun show` was asked for."""

    model: opt.ModelOptions
    json: bool


def show(
    model: opt.Model,
    revision: opt.Revision = None,
    offline: opt.Offline = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    color: opt.Color = "auto",
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show what MODEL is: architecture, sizes, quantization, tokenizer, bytes of cache a token.

    Reads headers only; a model that is not here is fetched first.

    \b
    Examples:
      kvrun show smollm2-135m
      kvrun show ./model.gguf --json
      kvrun show gemma3-270m --json | jq .parameters
    """
    console = opt.configure_console(opt.OutputOptions(color=color, quiet=quiet, verbose=verbose))
    _show(ShowOptions(opt.ModelOptions(model, revision=revision, offline=offline), json), console)


def _show(options: ShowOptions, console: Console) -> None:
    from kvrun.hub.facts import facts

    found = facts(opt.resolve_model(options.model, console))
    if options.json:
        from kvrun.cli.report import as_json

        console.out(as_json(asdict(found)))
        return
    for name, value in lines(found):
        console.line(f"{name:<18} {value}")


def lines(f: Facts) -> list[tuple[str, str]]:
    """The facts as (label, text)."""
    from kvrun.terminal import human_bytes

    full = f.layers - f.sliding_layers
    layers = f"{f.layers}, {f.sliding_layers} sliding over {f.window} tokens, {full} full" if f.sliding_layers else str(f.layers)
    cache = f"{human_bytes(f.kv_bytes_per_token)} at f16"
    if f.sliding_layers:
        cache += f"; {human_bytes(f.kv_bytes_per_token_full)} past the window of {f.window}"
    kinds = ", ".join(f"{kind} {100 * n / f.parameters:.3g}%" for kind, n in f.dtypes.items())
    shown = [
        ("name", f.name), ("source", f.source), ("path", f.path), ("revision", f.revision), ("licence", f.licence),
        ("size on disk", human_bytes(f.file_bytes)), ("architecture", f.architecture),
        ("parameters", f"{f.parameters:,} ({kinds})"), ("layers", layers),
        ("heads", f"{f.heads} query, {f.kv_heads} key/value, of {f.head_dim}"),
        ("widths", f"hidden {f.hidden}, feed-forward {f.ffn}, vocabulary {f.vocab_size}"),
        ("trained context", f"{f.context} tokens"), ("default context", f.n_ctx and f"{f.n_ctx} tokens"),
        ("cache a token", cache), ("tokenizer", f.tokenizer), ("chat template", "yes" if f.chat_template else "no"),
        ("sampling", ", ".join(f"{k} {v}" for k, v in f.sampling.items())),
    ]
    return [(name, str(value)) for name, value in shown if value]

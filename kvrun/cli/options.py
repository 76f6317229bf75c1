"""Options that several commands share, each declared once, and the frozen forms they are parsed into."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import typer.core

from kvrun.errors import StorageError, UsageError, show

if TYPE_CHECKING:
    from kvrun.backends.batch import Sampler
    from kvrun.engine import Engine
    from kvrun.hub.files import ModelFiles
    from kvrun.terminal import Console

class Command(typer.core.TyperCommand):
    """A command whose usage names arguments as its help does, without the braces that typer 0.28 puts around those that are required."""

    def collect_usage_pieces(self, ctx) -> list[str]:
        return [piece.removeprefix("{").removesuffix("}") for piece in super().collect_usage_pieces(ctx)]


Device = Literal["auto", "cpu", "cuda", "reference"]


def _n_ctx(text: str) -> int | str:
    """--n-ctx: a number of tokens from 1 on, or "max"."""
    if text == "max":
        return text
    try:
        value = int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number of tokens nor 'max'") from None
    if value < 1:
        raise typer.BadParameter(f"{value} is not at least 1")
    return value


def complete_model(incomplete: str) -> list[str]:
    """Aliases and models on this machine, for the shell's completion."""
    from kvrun.hub.catalog import load_catalog
    from kvrun.hub.facts import local_models

    catalog = load_catalog()
    names = {*catalog.aliases, *(model.name for model in local_models(catalog))}
    return sorted(name for name in names if name.startswith(incomplete))


def complete_session(incomplete: str) -> list[str]:
    """Saved sessions, for the shell's completion."""
    from kvrun.cache.session import sessions_dir

    folder = sessions_dir()
    return sorted(path.name for path in folder.glob(f"{incomplete}*")) if folder.is_dir() else []


Model = Annotated[str, typer.Argument(
    metavar="MODEL", show_default=False, autocompletion=complete_model, help="An alias of models.toml, a local folder, org/name[@revision], or a .gguf file.")]
NCtx = Annotated[int | None, typer.Option(
    "-n", "--n-ctx", metavar="N|max", parser=_n_ctx, show_default=False,
    help="Tokens of context, allocated at start; max is the most that fits. Default: the alias' value, else the trained length, at most 8192.")]


def complete_kv(incomplete: str) -> list[str]:
    """Cache formats, for the shell's completion."""
    from kvrun.cache.formats import KV_CHOICES

    return [name for name in KV_CHOICES if name.startswith(incomplete)]


def _known_format(kv: str) -> str:
    from kvrun.cache.formats import resolve_kv

    resolve_kv(kv, "bfloat16")  # before anything is fetched or opened
    return kv


Kv = Annotated[str, typer.Option(
    "--kv", metavar="FORMAT", callback=_known_format, autocompletion=complete_kv,
    help="Format of the KV cache: f16 (bf16 where the model is bf16), f32, q8 or q4; or two, for K and V: q8/q4.")]
Weights = Annotated[Literal["auto", "bf16", "q8", "q4"], typer.Option(
    "--weights", help="Format of the weights in memory: auto as the file has them; the others quantize what is stored in more bits (with q4, the embedding to 8).")]
ChatKv = Annotated[str | None, typer.Option(
    "--kv", metavar="FORMAT", callback=lambda kv: kv and _known_format(kv), autocompletion=complete_kv, show_default=False,
    help="Format of the KV cache: f16 (bf16 where the model is bf16), f32, q8 or q4; or two, for K and V: q8/q4. Default: the session's, else f16.")]
Think = Annotated[Literal["show", "hide"], typer.Option(
    "--think", help="Reasoning of models that think aloud: show it on stderr, dimmed, or hide it.")]
Overflow = Annotated[Literal["stop", "evict"], typer.Option(
    "--overflow", help="When the context is full: stop, or evict, which drops old pages of 128 tokens, says so, and goes on.")]
Keep = Annotated[int | None, typer.Option(
    "--keep", metavar="N", min=0, show_default=False,
    help="With --overflow evict: the first N tokens are never dropped; whole pages, at least one. Default: the system prompt.")]
Evict = Annotated[Literal["window", "strided"] | None, typer.Option(
    "--evict", show_default=False,
    help="With --overflow evict: window drops the oldest, whole chat turns first; strided keeps the newer half and, of "
         "the older, every n-th page. Default: window.")]
DeviceOption = Annotated[Device, typer.Option(
    "--device", help="Where to compute; reference is plain torch in float32, slow and exact.")]
Threads = Annotated[int | None, typer.Option(
    "--threads", metavar="N", min=1, max=256, show_default=False, help="CPU threads. Default: one per physical core.")]
Headroom = Annotated[float, typer.Option(
    "--headroom", metavar="PERCENT", min=0.0, max=99.0, help="Share of the available memory to leave alone; run and chat leave 10.")]
Revision = Annotated[str | None, typer.Option(
    "--revision", metavar="REV", show_default=False, help="Branch, tag or commit of a Hub model.")]
Offline = Annotated[bool, typer.Option(
    "--offline", help="Open no connection; use what is on disk.")]
TemplateFile = Annotated[Path | None, typer.Option(
    "--template-file", metavar="FILE", show_default=False, help="A Jinja chat template to use in place of the model's.")]
System = Annotated[str | None, typer.Option(
    "-s", "--system", metavar="TEXT", show_default=False, help="System prompt.")]

MaxTokens = Annotated[int | None, typer.Option(
    "--max-tokens", metavar="N", min=0, show_default=False,
    help="Longest answer. Default: until the model ends it or the context is full.")]
Temp = Annotated[float | None, typer.Option(
    "--temp", metavar="T", min=0.0, show_default=False,
    help="Temperature; 0 takes the likeliest token. This and the next four default to the model's generation_config.json, "
         "then to the alias, then to off.")]
TopP = Annotated[float | None, typer.Option(
    "--top-p", metavar="P", min=0.0, max=1.0, show_default=False,
    help="Keep the likeliest tokens that reach this probability together.")]
TopK = Annotated[int | None, typer.Option(
    "--top-k", metavar="K", min=0, show_default=False, help="Keep the K likeliest tokens; 0 keeps all.")]
MinP = Annotated[float | None, typer.Option(
    "--min-p", metavar="P", min=0.0, max=1.0, show_default=False,
    help="Keep tokens at least this probable, as a share of the likeliest one's probability.")]
RepeatPenalty = Annotated[float | None, typer.Option(
    "--repeat-penalty", metavar="X", min=0.0, show_default=False, help="Divide logits of tokens seen before; 1 is off.")]
Seed = Annotated[int | None, typer.Option(
    "--seed", metavar="N", min=0, max=2**64 - 1, show_default=False, help="Same seed, same answer. Default: drawn, and reported.")]
StopStrings = Annotated[list[str] | None, typer.Option(
    "--stop", metavar="TEXT", show_default=False, help="End the answer before this text. May be given more than once.")]

Color = Annotated[Literal["auto", "always", "never"], typer.Option(
    "--color", help="Colour of messages on stderr.")]
Sanitize = Annotated[Literal["auto", "never"], typer.Option(
    "--sanitize", help="auto: on a terminal, show control sequences in the answer instead of obeying them.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No notices and no progress on stderr.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="With an error, the Python trace.")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is opened."""

    model: str
    n_ctx: int | str | None = None
    kv: str = "f16"
    device: str = "auto"
    threads: int | None = None
    revision: str | None = None
    offline: bool = False
    template_file: Path | None = None
    weights: str = "auto"


@dataclass(frozen=True)
class OverflowOptions:
    """What happens when the context is full. None: not given."""

    overflow: str = "stop"
    keep: int | None = None
    policy: str | None = None


@dataclass(frozen=True)
class SamplingOptions:
    """How an answer is drawn and when it ends. None: not given."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class OutputOptions:
    """How the console writes."""

    color: str = "auto"
    sanitize: str = "auto"
    quiet: bool = False
    verbose: bool = False


# Sampler field -> its key in generation_config.json and in an alias' sampling table
_GENERATION_KEYS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
                    "repeat_penalty": "repetition_penalty"}
SAMPLER_RANGES: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0.0, 100.0), "top_p": (float, 0.0, 1.0), "top_k": (int, 0, 1 << 30), "min_p": (float, 0.0, 1.0),
    "repeat_penalty": (float, 1e-6, 1e6)}
"""Sampler field -> its type, the least and the most that it may be."""


def build_sampler(options: SamplingOptions, generation_config: dict[str, Any], alias: dict[str, Any]) -> Sampler:
    """Flags win over generation_config.json, that over the alias, and what nobody sets is off (greedy).

    A generation_config that says do_sample: false is greedy; one that says true and no temperature means 1.
    """
    from kvrun.backends.batch import Sampler

    def named(table: dict[str, Any]) -> dict[str, Any]:
        return {field: table[key] for field, key in _GENERATION_KEYS.items() if table.get(key) is not None}

    config = named(generation_config)
    if generation_config.get("do_sample") is False:
        config["temperature"] = 0.0
    elif generation_config.get("do_sample") is True:
        config.setdefault("temperature", 1.0)
    given = {field: getattr(options, field) for field in _GENERATION_KEYS if getattr(options, field) is not None}
    if given.get("repeat_penalty", 1.0) <= 0:
        raise UsageError("--repeat-penalty 0: must be above 0; 1 is off")
    chosen = named(alias) | config | given
    for field in SAMPLER_RANGES.keys() & chosen.keys():
        chosen[field] = _in_range(field, chosen[field], given=field in given)
    seed = options.seed
    if seed is None:
        seed = int.from_bytes(os.urandom(4)) if chosen.get("temperature", 0.0) > 0 else 0
    return Sampler(seed=seed, **chosen)


def _in_range(field: str, value: Any, *, given: bool) -> float:
    """A sampler's value in its type. given: by a flag, else by generation_config.json. UsageError."""
    kind, least, most = SAMPLER_RANGES[field]
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not least <= number <= most:
        where, what = (f"--{field.replace('_', '-')}", "") if given else ("generation_config.json", f": {_GENERATION_KEYS[field]}")
        where = {"--temperature": "--temp"}.get(where, where)
        raise UsageError(f"{where}{what} is {show(value)}, not a number from {least:g} to {most:g}" + ("" if given else "; give the flag instead"))
    return number


def formats(text: str | None) -> tuple[str, ...]:
    """A list of cache formats, parted by commas, each once; () for None. Whether they exist is the model's to say."""
    if text is None:
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if not all(names):
        raise UsageError(f"--kv {text}: give formats parted by commas, as in --kv f16,f32")
    return names


def configure_console(options: OutputOptions) -> Console:
    """This process' console, as the command line wants it."""
    from kvrun.terminal import configure

    return configure(color=options.color, sanitize=options.sanitize, quiet=options.quiet, verbose=options.verbose)


def resolve_model(options: ModelOptions, console: Console, *, weights: bool = True) -> ModelFiles:
    """The model's files, fetched when they are not here. weights: False is content with config.json alone."""
    from kvrun import hub
    from kvrun.cli.pull import transfer_progress
    from kvrun.terminal import termination

    try:
        with termination.raising():
            return hub.resolve(options.model, revision=options.revision, offline=options.offline, progress=transfer_progress(console),
                               weights=weights)
    finally:
        console.clear_progress()


def open_model(options: ModelOptions, files: ModelFiles, console: Console, *, max_out: int = 1) -> Engine:
    """The engine over `files`, with the template of --template-file where one is given."""
    from kvrun.runtime import open_engine
    from kvrun.terminal import termination

    template = _read_template(options.template_file) if options.template_file is not None else None

    def report(what: str, done: int, total: int) -> None:
        console.progress(what, done, total, unit="B")

    try:
        with termination.at_once():
            engine = open_engine(files, device=options.device, n_ctx=options.n_ctx, kv=options.kv, threads=options.threads,
                                 max_out=max_out, weights=options.weights, progress=report, notify=console.notice)
    finally:
        console.clear_progress()
    if template is not None:
        engine.text.use_template(template, str(options.template_file))
    return engine


def check_overflow(options: OverflowOptions) -> None:
    """UsageError for --keep or --evict where nothing is dropped."""
    for flag, value in (("--keep", options.keep), ("--evict", options.policy)):
        if value is not None and options.overflow == "stop":
            raise UsageError(f"{flag} {value}: only with --overflow evict is anything dropped; add it")


def set_overflow(options: OverflowOptions, engine: Engine, files: ModelFiles, system: str | None, *, chat: bool) -> None:
    """Tells the engine what to do when the context is full. chat: prompts go through the chat template, so that the
    system prompt is what is kept by default."""
    if options.overflow == "stop":
        return
    from kvrun.engine.conversation import head_tokens
    from kvrun.models import load_spec

    keep = options.keep
    if keep is None:
        keep = head_tokens(engine.text, system) if chat else 0
    # Frequencies that depend on the context's length (LongRoPE) are right up to that length alone.
    longest = load_spec(files.config, str(files.path), n_ctx=engine.spec.n_positions)
    limit = engine.spec.n_positions if longest.ropes == engine.spec.ropes else engine.n_ctx
    engine.evict(options.policy or "window", keep, limit=limit)


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"--template-file {path}: not UTF-8 text") from None
    except OSError as error:
        raise StorageError(f"--template-file {path}: {error.strerror}") from error

"""kvrun run: one answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvrun.cli import options as opt
from kvrun.errors import ContextFullError, UsageError

if TYPE_CHECKING:
    from kvrun.engine import Engine
    from kvrun.engine.events import Stop, Token
    from kvrun.hub.files import ModelFiles
    from kvrun.terminal import Console

ECHO_ROWS = 64
"""Prompt rows that give logits in one step with --echo; memory for them is rows * vocabulary * 4 bytes."""


@dataclass(frozen=True)
class RunOptions:
    """What `kvrun run` was asked for. logprobs: alternatives to report with each token; None: no log-probabilities."""

    model: opt.ModelOptions
    overflow: opt.OverflowOptions
    sampling: opt.SamplingOptions
    output: opt.OutputOptions
    prompt: str | None
    files: tuple[Path, ...]
    raw: bool
    system: str | None
    json: bool
    stats: bool
    logprobs: int | None
    echo: bool


def run(
    model: opt.Model,
    prompt: Annotated[str | None, typer.Argument(
        metavar="PROMPT", show_default=False, help="The prompt; text piped into standard input goes before it. - is standard input alone.")] = None,
    file: Annotated[list[Path] | None, typer.Option(
        "-f", "--file", metavar="FILE", show_default=False, help="A file to put before the prompt. May be given more than once.")] = None,
    system: opt.System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object: text, tokens, usage, timing.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="End with one line of counts and speeds on stderr.")] = False,
    logprobs: Annotated[int | None, typer.Option(
        "--logprobs", metavar="K", min=0, show_default=False, help="With --json: log-probabilities, and the K likeliest tokens at each place.")] = None,
    echo: Annotated[bool, typer.Option("--echo", help="With --json: log-probabilities of the prompt's tokens too.")] = False,
    n_ctx: opt.NCtx = None,
    kv: opt.Kv = "f16",
    weights: opt.Weights = "auto",
    overflow: opt.Overflow = "stop",
    keep: opt.Keep = None,
    evict: opt.Evict = None,
    device: opt.DeviceOption = "auto",
    threads: opt.Threads = None,
    max_tokens: opt.MaxTokens = None,
    temp: opt.Temp = None,
    top_p: opt.TopP = None,
    top_k: opt.TopK = None,
    min_p: opt.MinP = None,
    repeat_penalty: opt.RepeatPenalty = None,
    seed: opt.Seed = None,
    stop: opt.StopStrings = None,
    template_file: opt.TemplateFile = None,
    revision: opt.Revision = None,
    offline: opt.Offline = False,
    color: opt.Color = "auto",
    sanitize: opt.Sanitize = "auto",
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    """Print one answer of MODEL.

    The answer, and nothing else, goes to standard output as it is computed, ending with exactly one newline; --json
    has it unchanged. A chat model gets the prompt through its chat template; a model without one continues it.
    When the context is full before the answer ends, the exit code is 7; with --overflow evict, old text is dropped
    from it instead, each time with a line on standard error, and the answer goes on until the model or --max-tokens
    ends it.

    \b
    Examples:
      kvrun run smollm2-135m "Name three rivers."
      git log --oneline | kvrun run smollm2-135m "Summarize these changes:"
      kvrun run gemma3-270m --raw --max-tokens 40 "Once upon a time"
      kvrun run smollm2-135m -f notes.txt "What is still open?" --temp 0 --stats
      kvrun run smollm2-135m -f book.txt "What happened last?" -n 2048 --overflow evict --keep 200
      kvrun run smollm2-135m --raw -n 1024 --overflow evict --evict strided --max-tokens 5000 "Once upon a time"
      kvrun run smollm2-135m --raw --json --logprobs 5 --echo --max-tokens 1 "The sky is"
    """
    return _run(RunOptions(
        model=opt.ModelOptions(model, n_ctx, kv, device, threads, revision, offline, template_file, weights),
        overflow=opt.OverflowOptions(overflow, keep, evict),
        sampling=opt.SamplingOptions(max_tokens, temp, top_p, top_k, min_p, repeat_penalty, seed, tuple(stop or ())),
        output=opt.OutputOptions(color, sanitize, quiet, verbose),
        prompt=prompt, files=tuple(file or ()), raw=raw, system=system, json=json, stats=stats, logprobs=logprobs, echo=echo))


def _run(options: RunOptions) -> int:
    console = opt.configure_console(options.output)
    if (options.echo or options.logprobs is not None) and not options.json:
        raise UsageError("--logprobs and --echo go into the JSON; add --json")
    if options.raw and (options.system or options.model.template_file):
        raise UsageError("--raw uses no chat template, so it goes with neither --system nor --template-file")
    opt.check_overflow(options.overflow)
    from kvrun.cli.prompt import gather_prompt

    prompt = gather_prompt(options.prompt, options.files, raw=options.raw)
    files = opt.resolve_model(options.model, console)
    engine = opt.open_model(options.model, files, console, max_out=ECHO_ROWS if options.echo else 1)
    try:
        return _answer(options, console, files, engine, prompt)
    finally:
        engine.close()


def _continues(options: RunOptions, engine: Engine) -> bool:
    """Whether the answer goes on the prompt's own text, with no chat template between."""
    return options.raw or not engine.text.has_template


def _encode(options: RunOptions, engine: Engine, prompt: str) -> list[int]:
    if _continues(options, engine):
        if options.system:
            raise UsageError(f"{options.model.model} has no chat template, so --system has no place; put it into the prompt")
        return engine.text.encode(prompt, bos=True)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    return engine.text.encode_chat([*messages, {"role": "user", "content": prompt}], add_generation_prompt=True)


def _answer(options: RunOptions, console: Console, files: ModelFiles, engine: Engine, prompt: str) -> int:
    from kvrun.cli.interrupts import interrupts
    from kvrun.cli.report import answer_json, eviction_line, stats_line
    from kvrun.engine.events import Eviction, Notice, Prefill, Stop, Token

    opt.set_overflow(options.overflow, engine, files, options.system, chat=not _continues(options, engine))
    sampler = opt.build_sampler(options.sampling, files.generation_config, files.sampling)
    events = engine.generate(_encode(options, engine, prompt), sampler=sampler, max_tokens=options.sampling.max_tokens,
                             stop=options.sampling.stop, logprobs=options.logprobs or 0, echo=options.echo,
                             continued=_continues(options, engine))
    tokens: list[Token] = []
    end: Stop | None = None
    with interrupts(engine):
        for event in events:
            if isinstance(event, Token):
                tokens.append(event)
                if not options.json:
                    console.answer(event.text)
            elif isinstance(event, Prefill):
                console.progress("reading the prompt", event.done, event.total, unit="tokens")
            elif isinstance(event, Notice):
                console.notice(event.text)
            elif isinstance(event, Eviction):
                console.notice(eviction_line(event))
            elif isinstance(event, Stop):
                end = event
    assert end is not None
    if options.json:
        console.out(answer_json(files, engine, sampler, tokens, end))
    else:
        console.answer(end.text)
        console.end_answer()
    if options.stats:
        console.report(stats_line(engine, sampler, end))
    if end.reason == "interrupt":
        return 130
    if end.reason == "context":
        raise ContextFullError(f"the answer was cut: prompt and answer fill all {engine.n_ctx} tokens of context; "
                               "use a larger --n-ctx, --max-tokens, or --overflow evict")
    return 0

"""kvrun run: one answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from kvrun.cli import options as opt
from kvrun.errors import UsageError

_LONG = 1 << 18  # characters of a prompt whose encoding takes long enough to be seen
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
    jsonl: bool = False
    extract: bool = False
    each: bool = False
    schema: Path | None = None
    regex: str | None = None
    think: str = "show"
    prompt_cache: bool = True


def run(
    model: opt.Model,
    prompt: Annotated[str | None, typer.Argument(
        metavar="PROMPT", show_default=False, help="The prompt; text piped into standard input goes before it. - is standard input alone.")] = None,
    file: Annotated[list[Path] | None, typer.Option(
        "-f", "--file", metavar="FILE", show_default=False, help="A file to put before the prompt; - is standard input. May be given more than once.")] = None,
    system: opt.System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object: text, tokens, usage, timing.")] = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print events as they come, one JSON object a line: prefill, token, stop, ...")] = False,
    extract: Annotated[bool, typer.Option("-x", "--extract", help="Print the first fenced code block of the answer alone.")] = False,
    each: Annotated[bool, typer.Option(
        "--each", help="Answer each line of standard input, after PROMPT, with one JSON object a line. What the prompts share is read once.")] = False,
    schema: Annotated[Path | None, typer.Option(
        "--schema", metavar="FILE", show_default=False, help="The answer is JSON that this JSON schema allows.")] = None,
    regex: Annotated[str | None, typer.Option(
        "--regex", metavar="R", show_default=False, help="The whole answer matches this regular expression.")] = None,
    think: opt.Think = "show",
    prompt_cache: Annotated[bool, typer.Option(
        "--prompt-cache/--no-prompt-cache", help="Read the pages of a prompt seen before from disk, and write those of a new one.")] = True,
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
    A prompt of 256 tokens or more is kept on disk as cache pages: the next run that begins alike starts at once.
    When the context is full before the answer ends, the exit code is 7; with --overflow evict, old text is dropped
    from it instead, each time with a line on standard error, and the answer goes on until the model or --max-tokens
    ends it.

    \b
    Examples:
      kvrun run smollm2-135m "Name three rivers."
      git log --oneline | kvrun run smollm2-135m "Summarize these changes:"
      kvrun run gemma3-270m --raw --max-tokens 40 "Once upon a time"
      kvrun run smollm2-135m -f notes.txt "What is still open?" --temp 0 --stats
      kvrun run smollm2-135m -x "A Python function that reverses a string" > reverse.py
      kvrun run smollm2-135m --schema person.json "Describe a person." | jq .name
      cut -f2 reviews.tsv | kvrun run smollm2-135m --each --regex "good|bad" "Is this review good or bad?"
      kvrun run smollm2-135m -f book.txt "What happened last?" -n 2048 --overflow evict --keep 200
      kvrun run smollm2-135m --raw -n 1024 --overflow evict --evict strided --max-tokens 5000 "Once upon a time"
      kvrun run smollm2-135m --raw --json --logprobs 5 --echo --max-tokens 1 "The sky is"
    """
    return _run(RunOptions(
        model=opt.ModelOptions(model, n_ctx, kv, device, threads, revision, offline, template_file, weights),
        overflow=opt.OverflowOptions(overflow, keep, evict),
        sampling=opt.SamplingOptions(max_tokens, temp, top_p, top_k, min_p, repeat_penalty, seed, tuple(stop or ())),
        output=opt.OutputOptions(color, sanitize, quiet, verbose),
        prompt=prompt, files=tuple(file or ()), raw=raw, system=system, json=json, stats=stats, logprobs=logprobs, echo=echo,
        jsonl=jsonl, extract=extract, each=each, schema=schema, regex=regex, think=think, prompt_cache=prompt_cache))


def _run(options: RunOptions) -> int:
    from kvrun.cli.prompt import gather_prompt
    from kvrun.cli.run_answer import Runner
    from kvrun.text import prepare_chat

    console = opt.configure_console(options.output)
    _check(options)
    schema = _schema_text(options)
    if not options.raw:
        prepare_chat()
    prompt = "" if options.each else gather_prompt(options.prompt, options.files, raw=options.raw)
    files = opt.resolve_model(options.model, console)
    engine = opt.open_model(options.model, files, console, max_out=ECHO_ROWS if options.echo else 1)
    try:
        runner = Runner(options, console, files, engine, schema)
        if options.each:
            from kvrun.cli.run_each import answer_each

            return answer_each(runner)
        if len(prompt) > _LONG:
            console.progress("encoding the prompt", len(prompt.encode()), None, unit="B")
        return runner.answer(runner.encode(prompt))
    finally:
        engine.close()


def _check(options: RunOptions) -> None:
    """UsageError for options that do not go together."""
    if (options.echo or options.logprobs is not None) and not (options.json or options.jsonl):
        raise UsageError("--logprobs and --echo go into the JSON; add --json")
    if options.raw and (options.system or options.model.template_file):
        raise UsageError("--raw uses no chat template, so it goes with neither --system nor --template-file")
    forms = [flag for flag, given in (("--json", options.json), ("--jsonl", options.jsonl), ("--extract", options.extract)) if given]
    if len(forms) > 1:
        raise UsageError(f"{' and '.join(forms)}: give one of them")
    if options.each and (options.jsonl or options.extract):
        raise UsageError("--each prints one JSON object a line; it goes with neither --jsonl nor --extract")
    if options.schema and options.regex:
        raise UsageError("--schema and --regex: give one of them")
    opt.check_overflow(options.overflow)
    if options.schema or options.regex:
        from kvrun.text.grammar import available

        available()


def _schema_text(options: RunOptions) -> str | None:
    from kvrun.cli.prompt import read_file

    return read_file(options.schema) if options.schema else None

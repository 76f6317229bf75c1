"""kvrun chat: a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvrun.cli import options as opt
from kvrun.errors import ContextFullError, UsageError

if TYPE_CHECKING:
    from kvrun.backends.batch import Sampler
    from kvrun.engine import Engine
    from kvrun.engine.conversation import Conversation
    from collections.abc import Iterator

    from kvrun.engine.events import Event, Stop
    from kvrun.hub.files import ModelFiles
    from kvrun.terminal import Console
    from kvrun.terminal.lines import LineReader

_MENDS = "/clear forgets the conversation, and a chat with --overflow evict drops its oldest turns"


@dataclass(frozen=True)
class ChatOptions:
    """What `kvrun chat` was asked for."""

    model: opt.ModelOptions
    overflow: opt.OverflowOptions
    sampling: opt.SamplingOptions
    output: opt.OutputOptions
    system: str | None
    stats: bool


def chat(
    model: Annotated[str | None, typer.Argument(
        metavar="MODEL", show_default=False,
        help="An alias of models.toml, a local folder, org/name[@revision], or a .gguf file. Default: that of models.toml.")] = None,
    system: opt.System = None,
    stats: Annotated[bool, typer.Option("--stats", help="After each answer, one line of counts and speeds on stderr.")] = False,
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
    """Talk with MODEL.

    Ctrl-C stops an answer and keeps it; a second one at an empty prompt leaves, as do Ctrl-D and /exit. /help lists
    the commands. Without a terminal, each line of standard input is a message. With --overflow evict a conversation
    may grow past the context: its oldest turns are dropped, with a line that says so, and its system prompt stays.

    \b
    Examples:
      kvrun chat
      kvrun chat smollm2-135m -s "You answer in one sentence." --temp 0
      kvrun chat Qwen/Qwen3-0.6B -n 16384 --stats
      kvrun chat smollm2-135m -s "You are a pirate." -n 2048 --overflow evict
      printf 'Hello!\\nSay it in French.\\n' | kvrun chat smollm2-135m
    """
    return _chat(ChatOptions(
        model=opt.ModelOptions(model or _default_model(), n_ctx, kv, device, threads, revision, offline, template_file, weights),
        overflow=opt.OverflowOptions(overflow, keep, evict),
        sampling=opt.SamplingOptions(max_tokens, temp, top_p, top_k, min_p, repeat_penalty, seed, tuple(stop or ())),
        output=opt.OutputOptions(color, sanitize, quiet, verbose), system=system, stats=stats))


def _default_model() -> str:
    from kvrun.hub.catalog import load_catalog

    return load_catalog().default


def _chat(options: ChatOptions) -> int:
    from kvrun.engine.conversation import Conversation

    console = opt.configure_console(options.output)
    opt.check_overflow(options.overflow)
    files = opt.resolve_model(options.model, console)
    engine = opt.open_model(options.model, files, console)
    try:
        if not engine.text.has_template:
            raise UsageError(f"{files.name} has no chat template; use 'kvrun run', or give one with --template-file")
        opt.set_overflow(options.overflow, engine, files, options.system, chat=True)
        sampler = opt.build_sampler(options.sampling, files.generation_config, files.sampling)
        conversation = Conversation(engine.text, options.system)
        reader = _open_reader(console)
        if console.stderr_is_terminal:
            console.notice(f"{files.name}, {engine.n_ctx} tokens of context; /help lists the commands, Ctrl-D leaves")
        return Chat(options, console, engine, conversation, sampler, reader).loop()
    finally:
        engine.close()


def _open_reader(console: Console) -> LineReader:
    from kvrun.terminal import streams
    from kvrun.terminal.lines import PipedLines, TerminalLines

    if not streams.is_terminal(streams.STDIN):
        return PipedLines()
    import platformdirs

    history = Path(platformdirs.user_state_dir("kvrun", appauthor=False)) / "chat_history"
    try:
        return TerminalLines(history)
    except OSError as error:
        console.notice(f"{history} cannot be written ({error.strerror}); the history of this chat will not be kept")
        return TerminalLines(None)


class Chat:
    """The loop: a line is a command or a message, and a message gets an answer."""

    def __init__(self, options: ChatOptions, console: Console, engine: Engine, conversation: Conversation,
                 sampler: Sampler, reader: LineReader) -> None:
        self.options = options
        self.console = console
        self.engine = engine
        self.conversation = conversation
        self.sampler = sampler
        self.reader = reader
        self.leaving = False
        self._next_interrupt_leaves = False

    def loop(self) -> int:
        """Runs until the user leaves. Returns the exit code."""
        from kvrun.cli.slash import dispatch
        from kvrun.terminal.lines import LineCleared

        lines = 0
        while not self.leaving:
            try:
                line = self.reader.read()
            except EOFError:
                break
            except LineCleared:
                continue
            except UsageError as error:
                self.console.error(str(error))
                continue
            except KeyboardInterrupt:
                if not self._on_terminal:
                    raise
                if self._next_interrupt_leaves:
                    break
                self._next_interrupt_leaves = True
                self.console.report("Ctrl-C again, or Ctrl-D, leaves")
                continue
            lines += 1
            self._next_interrupt_leaves = False
            if line.startswith("/") and not line.startswith("//"):
                dispatch(self, line.rstrip())
            elif line.strip():
                self._take_turn(line[1:] if line.startswith("//") else line)
        if not lines and not self._on_terminal:
            raise UsageError("chat needs a terminal, or messages on standard input, one a line; for one answer use 'kvrun run'")
        return 0

    @property
    def _on_terminal(self) -> bool:
        from kvrun.terminal.lines import TerminalLines

        return isinstance(self.reader, TerminalLines)

    def _take_turn(self, message: str) -> None:
        """One message and its answer. What can be said in a line and mended by the user does not end the chat."""
        from kvrun.text.template import TemplateError

        try:
            sampling = self.options.sampling
            events = self.engine.generate(self.conversation.ask(message), sampler=self.sampler, max_tokens=sampling.max_tokens, stop=sampling.stop)
        except ContextFullError as error:
            self.console.report(f"context full: {error}; {_MENDS}")
            return
        except TemplateError as error:
            self.console.error(str(error))
            return
        end, text, ids = self._show(events)
        if ids:
            self.conversation.answered(text, ids)
        if self.options.stats:
            from kvrun.cli.report import stats_line

            self.console.report(stats_line(self.engine, self.sampler, end))
        if end.reason == "context":
            self.console.report(f"context full: the answer was cut at {self.engine.n_ctx} tokens; {_MENDS}")
        elif end.reason == "interrupt":
            if not self._on_terminal:
                raise KeyboardInterrupt
            self._next_interrupt_leaves = True
            if not ids:
                self.console.report("stopped before the answer began; the message was taken back")

    def _show(self, events: Iterator[Event]) -> tuple[Stop, str, list[int]]:
        """Renders an answer. Returns its end, its text and its token ids."""
        from kvrun.cli.interrupts import interrupts
        from kvrun.cli.report import eviction_line
        from kvrun.engine.events import Eviction, Notice, Prefill, Stop, Token
        from kvrun.terminal.lines import without_echo

        pieces: list[str] = []
        ids: list[int] = []
        with without_echo(), interrupts(self.engine):
            for event in events:
                if isinstance(event, Token):
                    ids.append(event.id)
                    pieces.append(event.text)
                    self.console.answer(event.text)
                elif isinstance(event, Prefill):
                    self.console.progress("reading", event.done, event.total, unit="tokens")
                elif isinstance(event, Notice):
                    self.console.notice(event.text)
                elif isinstance(event, Eviction):
                    self.console.notice(eviction_line(event))
                elif isinstance(event, Stop):
                    end = event
        pieces.append(end.text)
        self.console.answer(end.text)
        self.console.end_answer()
        return end, "".join(pieces), ids

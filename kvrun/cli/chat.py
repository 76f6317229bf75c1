"""kvrun chat: a conversation."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvrun.cli import options as opt
from kvrun.errors import StorageError, UsageError

if TYPE_CHECKING:
    from kvrun.backends.batch import Sampler
    from kvrun.cache.session import Session, SessionStore
    from kvrun.cli.chat_loop import Chat
    from kvrun.hub.files import ModelFiles
    from kvrun.terminal import Console


@dataclass(frozen=True)
class ChatOptions:
    """What `kvrun chat` was asked for."""

    model: opt.ModelOptions
    overflow: opt.OverflowOptions
    sampling: opt.SamplingOptions
    output: opt.OutputOptions
    system: str | None
    stats: bool
    resume: bool = False
    session: str | None = None
    session_limit: int | None = None
    think: str = "show"
    markdown: bool = False
    save: bool = True


def chat(
    model: Annotated[str | None, typer.Argument(
        metavar="MODEL", show_default=False, autocompletion=opt.complete_model,
        help="An alias of models.toml, a local folder, org/name[@revision], or a .gguf file. Default: that of models.toml.")] = None,
    system: opt.System = None,
    resume: Annotated[bool, typer.Option(
        "-c", "--continue", help="Go on with the session used last, or with --session's; its model, format and settings are the defaults.")] = False,
    session: Annotated[str | None, typer.Option(
        "--session", metavar="NAME", show_default=False, autocompletion=opt.complete_session, help="Go on with this session, or begin it. Default: a new one, named by the time.")] = None,
    session_limit: Annotated[int | None, typer.Option(
        "--session-limit", metavar="MIB", min=0, show_default=False,
        help="What all sessions may take on disk; beyond it those used longest ago lose their cache, not their text. Default: 4096.")] = None,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Save each turn; a chat that is not saved leaves nothing behind.")] = True,
    think: opt.Think = "show",
    markdown: Annotated[bool, typer.Option("--markdown", help="Show answers as Markdown, block by block.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="After each answer, one line of counts and speeds on stderr.")] = False,
    n_ctx: opt.NCtx = None,
    kv: opt.ChatKv = None,
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

    Each turn is saved as a session, with the cache, so that -c goes on where it ended without reading it again. Ctrl-C
    stops an answer and keeps it; at an empty prompt, twice, it leaves, as do Ctrl-D and /exit. /help lists the
    commands, among them /undo, /regen and /edit. Without a terminal, each line of standard input is a message. With
    --overflow evict a conversation may grow past the context: its oldest turns are dropped, with a line that says so.

    \b
    Examples:
      kvrun chat smollm2-135m -s "You answer in one sentence." --temp 0
      kvrun chat -c
      kvrun chat smollm2-135m --session thesis -n 4096 --overflow evict
      printf 'Hello!\\nSay it in French.\\n' | kvrun chat smollm2-135m
    """
    return _chat(ChatOptions(
        model=opt.ModelOptions(model or "", n_ctx, kv or "", device, threads, revision, offline, template_file, weights),
        overflow=opt.OverflowOptions(overflow, keep, evict),
        sampling=opt.SamplingOptions(max_tokens, temp, top_p, top_k, min_p, repeat_penalty, seed, tuple(stop or ())),
        output=opt.OutputOptions(color, sanitize, quiet, verbose), system=system, stats=stats, resume=resume, session=session,
        session_limit=session_limit, think=think, markdown=markdown, save=save))


def _default_model() -> str:
    from kvrun.hub.catalog import load_catalog

    return load_catalog().default


def _chat(options: ChatOptions) -> int:
    from kvrun.cache.session import LIMIT, SessionStore
    from kvrun.terminal import termination
    from kvrun.terminal.lines import typed_ahead
    from kvrun.text import prepare_chat

    console = opt.configure_console(options.output)
    opt.check_overflow(options.overflow)
    prepare_chat()
    store = SessionStore(limit=LIMIT if options.session_limit is None else options.session_limit << 20)
    if not options.save and (options.resume or options.session):
        raise UsageError("--no-save goes with neither --continue nor --session")
    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(typed_ahead())
        session = _open_session(options, store, console) if options.save else None
        kept = session is not None
        if session is None:
            folder = tempfile.TemporaryDirectory(prefix="kvrun-")
            cleanup.enter_context(termination.cleaned_by(folder.cleanup))
            store = SessionStore(Path(cleanup.enter_context(folder)))
            session = store.new()
        cleanup.callback(session.close)
        return _open_chat(options, console, store, session, kept).loop()


def _open_session(options: ChatOptions, store: SessionStore, console: Console) -> Session | None:
    """The session that the options name, read; one that cannot be read is put aside, with a line that says where. None, with a line that
    says why, where a new one cannot be made."""
    from kvrun.cache.session import DamagedSessionError

    name = options.session or (store.last() if options.resume else None)
    if options.resume and options.session:
        store.info(options.session)
    try:
        session = store.open(name) if name else store.new()
    except StorageError as error:
        if options.resume or options.session:
            raise
        console.notice(f"{error}; this chat will not be saved")
        return None
    try:
        session.read()
    except DamagedSessionError as error:
        console.notice(f"{error}; it was put aside as {session.quarantine()}, and {session.name} begins anew")
    except BaseException:
        session.close()
        raise
    return session


def _open_chat(options: ChatOptions, console: Console, store: SessionStore, session: Session, kept: bool) -> Chat:
    from kvrun.cli.chat_loop import Chat
    from kvrun.engine.conversation import Conversation
    from kvrun.terminal import termination

    saved: dict[str, Any] = session.document.get("model", {})
    if options.model.model not in ("", saved.get("call"), saved.get("name")):
        saved = {}  # another model than the session's
    model = replace(options.model, model=options.model.model or saved.get("call") or _default_model(), kv=options.model.kv or saved.get("kv", "f16"),
                    n_ctx=options.model.n_ctx or saved.get("n_ctx"),
                    weights=saved.get("weights", "auto") if options.model.weights == "auto" else options.model.weights)
    files = opt.resolve_model(model, console)
    _check_template(model, files)
    engine = opt.open_model(model, files, console)
    try:
        system = options.system if options.system is not None else session.document.get("system")
        opt.set_overflow(options.overflow, engine, files, system, chat=True)
        sampler = _sampler(options, files, session)
        chat = Chat(options, console, files, engine, Conversation(engine.text, system), sampler, store, session, kept, model.weights)
        with termination.at_once():
            chat.start(system)
        if console.stderr_is_terminal:
            console.notice(f"{files.name}, {engine.n_ctx} tokens of context; /help for commands, Ctrl-D leaves")
        return chat
    except BaseException:
        engine.close()
        raise


def _check_template(model: opt.ModelOptions, files: ModelFiles) -> None:
    """UsageError for a model that cannot hold a conversation, before its weights are read."""
    from kvrun.hub.facts import has_template

    if model.template_file is None and not has_template(files):
        raise UsageError(f"{files.name} has no chat template; use 'kvrun run', or give one with --template-file")


def _sampler(options: ChatOptions, files: ModelFiles, session: Session) -> Sampler:
    """As for every command; a session's own settings come before the model's."""
    saved = session.document.get("settings", {}).get("sampler", {})
    given = {field: saved[field] for field in ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed")
             if getattr(options.sampling, field) is None and field in saved}
    return opt.build_sampler(replace(options.sampling, **given), files.generation_config, files.sampling)

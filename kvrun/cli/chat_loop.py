"""The loop of a chat: a line is a command or a message, a message gets an answer, and every turn is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kvrun.errors import ContextFullError, KvrunError, UsageError

if TYPE_CHECKING:
    from kvrun.backends.batch import Sampler
    from kvrun.cache.session import Session, SessionStore
    from kvrun.cli.chat import ChatOptions
    from kvrun.engine import Engine
    from kvrun.engine.conversation import Conversation, Turn
    from kvrun.engine.events import Event, Stop
    from kvrun.engine.saved import SavedChat
    from kvrun.hub.files import ModelFiles
    from kvrun.terminal import Console
    from kvrun.terminal.lines import LineReader

_MENDS = "/undo takes turns back, /clear begins anew, and a chat with --overflow evict drops its oldest turns"


class Chat:
    """A conversation, its session and the terminal.

    sampler, max_tokens, think, stats: settings that commands change. attached: texts that go before the next message.
    draft: what the next prompt begins with. last: the end of the last answer. kept: whether sessions outlive the process.
    """

    def __init__(self, options: ChatOptions, console: Console, files: ModelFiles, engine: Engine, conversation: Conversation,
                 sampler: Sampler, store: SessionStore, session: Session, kept: bool, weights: str) -> None:
        self.weights = weights
        self.options = options
        self.console = console
        self.files = files
        self.engine = engine
        self.conversation = conversation
        self.sampler = sampler
        self.max_tokens = options.sampling.max_tokens
        self.think = options.think
        self.stats = options.stats
        self.store = store
        self.session = session
        self.kept = kept
        self.attached: list[tuple[str, str]] = []
        self.draft = ""
        self.last: Stop | None = None
        self.leaving = False
        self._unsaved: str | None = None
        self._full = False
        self.reader = self._open_reader()

    def start(self, system: str | None) -> None:
        """Binds the session, and goes on with what it holds. system: the prompt that is wanted."""
        if self.options.markdown:
            self.console.markdown()
        self.saved = self._bound(self.session)
        if self.session.document:
            self.resume()
            if system != self.conversation.system:
                self.conversation.change_system(system)

    def resume(self) -> None:
        """Takes on what the session holds, with a line about it."""
        for line in self.saved.resume():
            self.console.notice(line)
        turns = len(self.conversation.turns)
        self.console.notice(f"session {self.session.name}: {turns} {'turn' if turns == 1 else 'turns'}, {len(self.engine.tokens)} tokens in the cache")

    def switch(self, session: Session) -> None:
        """Goes on in another session: a new one with the conversation as it is, or an old one with what it holds."""
        before, self.session = self.session, session
        self.saved = self._bound(session)
        if session.document:
            self.resume()
        before.close()

    def _bound(self, session: Session) -> SavedChat:
        from kvrun.engine.saved import SavedChat

        return SavedChat(self.store, session, self.files, self.engine, self.conversation, self.weights)

    # ---- the loop ----

    def loop(self) -> int:
        """Runs until the user leaves. Returns the exit code."""
        from kvrun.cli.interrupts import uninterrupted

        try:
            # On a terminal Ctrl-C is a key of the prompt and stops answers; between the two, one too many does nothing.
            with uninterrupted() if self.on_terminal else nullcontext():
                lines = self._read_lines()
        finally:
            self.session.close()
            self.engine.close()
        if not lines and not self.on_terminal:
            raise UsageError("chat needs a terminal, or messages on standard input, one a line; for one answer use 'kvrun run'")
        return 9 if self._unsaved else ContextFullError.exit_code if self._full and not self.on_terminal else 0

    def _read_lines(self) -> int:
        """Until the user leaves. Returns how many lines there were."""
        from kvrun.cli.slash import dispatch
        from kvrun.terminal.lines import LineCleared

        lines, interrupted = 0, False
        while not self.leaving:
            draft, self.draft = self.draft, ""
            again, interrupted = interrupted, False
            try:
                line = self.reader.read(draft)
            except EOFError:
                break
            except LineCleared:
                continue
            except UsageError as error:
                self.console.error(str(error))
                continue
            except KeyboardInterrupt:
                if not self.on_terminal:
                    raise
                if again:
                    break
                interrupted = True
                self.console.report("Ctrl-C again, or Ctrl-D, leaves")
                continue
            lines += 1
            if line.startswith("/") and not line.startswith("//"):
                self._obey(line, dispatch)
            elif line.strip():
                self.take_turn(line[1:] if line.startswith("//") else line)
        return lines

    def _obey(self, line: str, dispatch) -> None:
        """Carries out a command. What fails in it is one line, and the chat goes on."""
        from kvrun.terminal import termination

        with termination.held():
            try:
                dispatch(self, line.rstrip())
            except KvrunError as error:
                self.console.error(str(error))

    @property
    def on_terminal(self) -> bool:
        """Whether somebody sits there."""
        from kvrun.terminal.lines import TerminalLines

        return isinstance(self.reader, TerminalLines)

    # ---- turns ----

    def take_turn(self, message: str) -> None:
        """One message and its answer. SIGTERM and SIGHUP end the answer, and the turn is saved before the chat ends."""
        from kvrun.cli.interrupts import interruptible
        from kvrun.terminal import termination

        attached, self.attached = self.attached, []
        message = "\n\n".join([*(text for _, text in attached), message])
        with termination.held():
            done = False
            with self._mending():
                with termination.raising(), interruptible():
                    ids = self.conversation.ask(message)
                done = self._answer(ids)
            if not done:
                self.attached = attached

    def take_again(self, turn: Turn) -> None:
        """Another answer to a turn just taken back, which comes back if there is none."""
        from kvrun.terminal import termination

        with termination.held():
            done = False
            with self._mending():
                done = self._answer(self.conversation.ask_again(turn))
            if not done:
                self.conversation.turns.append(turn)

    @contextmanager
    def _mending(self) -> Iterator[None]:
        """What can be said in a line and mended by the user does not end the chat."""
        from kvrun.text.template import TemplateError

        try:
            yield
        except ContextFullError as error:
            self._full = True
            self.console.report(f"context full: {error.what}; {_MENDS}")
        except TemplateError as error:
            self.console.error(str(error))
        except KeyboardInterrupt:  # while the message was encoded
            if not self.on_terminal:
                raise
            self._taken_back()

    def _answer(self, ids: list[int]) -> bool:
        """Whether an answer to the prompt `ids` came; it is recorded and saved."""
        from kvrun.cli.interrupts import uninterrupted

        events = self.engine.generate(ids, sampler=self.sampler, max_tokens=self.max_tokens, stop=self.options.sampling.stop)
        with uninterrupted():
            end, text, said = self._show(events, ids)
            self.last = end
            if said:
                self.conversation.answered(text, said)
                self.save()
        if self.stats:
            self.report_stats()
        if end.reason == "context":
            self._full = True
            self.console.report(f"context full: the answer was cut at {self.engine.n_ctx} tokens; {_MENDS}")
        elif end.reason == "interrupt":
            from kvrun.terminal import termination

            if not self.on_terminal and not termination.requested():
                raise KeyboardInterrupt
            if not said:
                self._taken_back()
        return bool(said)

    def _taken_back(self) -> None:
        self.console.report("stopped before the answer began; the message was taken back" + ("; Up brings it here" if self.on_terminal else ""))

    def report_stats(self) -> None:
        """Counts and speeds of the last answer."""
        from kvrun.cli.report import stats_line

        self.console.report(stats_line(self.engine, self.sampler, self.last) if self.last else "no answer yet")

    def _show(self, events: Iterator[Event], prompt: list[int]) -> tuple[Stop, str, list[int]]:
        """Renders an answer. Returns its end, its text and its token ids."""
        from kvrun.cli.answer import AnswerView
        from kvrun.cli.interrupts import interrupts
        from kvrun.cli.report import Drops
        from kvrun.engine.events import Notice, Prefill, Stop, Token

        view = AnswerView(self.console, self.engine.text, prompt, self.think)
        drops = Drops(self.console.notice)
        ids: list[int] = []
        with interrupts(self.engine, stay=self.on_terminal):
            for event in events:
                drops.event(event)
                if isinstance(event, Token):
                    ids.append(event.id)
                    view.push(event.text)
                    if self.options.markdown:  # a block is shown when it is complete
                        self.console.progress("answering", len(ids), None, unit="tokens")
                elif isinstance(event, Prefill):
                    self.console.progress("reading", event.done, event.total, unit="tokens")
                elif isinstance(event, Notice):
                    self.console.notice(event.text)
                elif isinstance(event, Stop):
                    end = event
        view.end(end.text)
        return end, view.text, ids

    def save(self) -> None:
        """Saves the session. That it cannot be is said once, and the chat goes on."""
        from kvrun.terminal import termination

        self.saved.settings = {"sampler": asdict(self.sampler)}
        try:
            with termination.held():
                self.saved.save()
            if self.saved.failed and self.saved.failed != self._unsaved:
                self.console.error(f"the cache of this session cannot be saved: {self.saved.failed}; its conversation is")
            self._unsaved = self.saved.failed
            for name in self.store.trim(self.session.name):
                self.console.notice(f"sessions take more than {self.store.limit >> 20} MiB: the cache of session {name}, used longest ago, was "
                                    "removed; its conversation stays")
        except OSError as error:
            what = f"{error.filename or self.session.folder}: {error.strerror or error}"
            if what != self._unsaved:
                self.console.error(f"this session cannot be saved: {what}; the chat goes on, and what was saved before is whole")
            self._unsaved = what

    # ---- the prompt ----

    def _open_reader(self) -> LineReader:
        from kvrun.terminal import streams
        from kvrun.terminal.lines import PipedLines, TerminalLines

        if not streams.is_terminal(streams.STDIN):
            return PipedLines()
        import platformdirs

        from kvrun.cli.slash import completions

        history = Path(platformdirs.user_state_dir("kvrun", appauthor=False)) / "chat_history"
        look = {"status": self.status, "completions": lambda text: completions(self, text), "color": self.console.stderr_color,
                "remember": self.options.save}
        try:
            return TerminalLines(history, **look)
        except OSError as error:
            self.console.notice(f"{history} cannot be written ({error.strerror}); the history of this chat will not be kept")
            return TerminalLines(None, **look)

    @property
    def held(self) -> int:
        """Tokens of the conversation that are in the cache. The cache may hold more: of a turn taken back, until the next message."""
        known = self.conversation.n_tokens
        return self.engine.held if known is None else min(known, self.engine.held)

    def status(self) -> str:
        """The line below the prompt."""
        from kvrun.cache.formats import kv_name
        from kvrun.terminal import human_bytes

        pool = self.engine.pool
        parts = [f"ctx {self.held}/{self.engine.n_ctx}", f"kv {kv_name(pool.kv)} {human_bytes(pool.n_bytes)}"]
        if self.last and self.last.stats.decode_steps:
            parts.append(f"{self.last.stats.decode_rate:.0f} tok/s")
        if self.attached:
            parts.append("with " + ", ".join(name for name, _ in self.attached))
        return " · ".join(parts)

"""A chat that goes on and on: python tests/faults/soak.py --minutes 30 [--model tiny].

One process types into `kvrun chat` on a real pseudo-terminal: messages, every command, Ctrl-C at any moment, leaving in every way and going on
with the session. The chat runs under a limit on its address space, with a small context that evicts, and looks at itself before each prompt:

- every page of the pool is free or owned by the sequence, once; none is lost; positions ascend and cover what is said to be held;
- every page on disk that a mark needs is there;
- pages that are given back are filled with NaN, so that an answer from a page of the dead is no answer but exit code 8.

Prints what happened as JSON; exit code 1, with the end of the screen, when anything of that does not hold or the memory grows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import string
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.append(str(TESTS))             # for cli.terminal and engine.tiny_model, where this runs as a script
WORDS = (TESTS / "data" / "alice.txt").read_text(encoding="utf-8").split()
GROWTH = 96 << 20
"""Bytes that resident memory may grow by after the first turns: conversations of up to CLEAR turns, pages of Python's own."""
WARM = 40
CLEAR = 60
"""Prompts after which the memory counts as that of the start, and after which a conversation is forgotten."""


# ---- the chat, watching itself ----


def watch(report: str, limit: int, arguments: list[str]) -> int:
    """`kvrun chat` with `arguments`, looking at itself before each prompt; a line of `report` says that all is well."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    from kvrun.cli.chat_loop import Chat
    from kvrun.cli.main import main

    start = Chat.start
    lines = open(report, "a", encoding="ascii", buffering=1)  # noqa: SIM115 - as long as the process

    def started(chat: Chat, system: str | None) -> None:
        poison(chat.engine.pool)
        start(chat, system)
        read, last = chat.reader.read, [None]

        def watched(draft: str = "") -> str:
            facts = {"rss": resident(os.getpid()), "held": chat.engine.held, "turns": len(chat.conversation.turns), "session": chat.session.name}
            if chat.last is not last[0]:
                last[0] = chat.last
                facts |= {"reason": chat.last.reason, "evictions": len(chat.last.stats.evictions), "said": chat.last.stats.generated_tokens}
            try:
                check(chat)
            except AssertionError as error:
                facts["wrong"] = str(error) or "an assertion"
            lines.write(json.dumps(facts) + "\n")
            return read(draft)

        chat.reader.read = watched

    Chat.start = started
    return main(["chat", *arguments])


def poison(pool) -> None:
    """Pages that nobody owns hold NaN in every format, from now on."""
    for index, free in enumerate(pool._free):
        def give(page: int, index: int = index, give=free.give) -> None:
            pool.page(index, page)[:] = 0xFF
            give(page)

        for page in free._free:
            pool.page(index, page)[:] = 0xFF
        free.give = give


def check(chat) -> None:
    """AssertionError with what does not hold."""
    engine = chat.engine
    sequence, pool = engine.sequence, engine.pool
    for index, (group, free) in enumerate(zip(sequence._groups, pool._free, strict=True)):
        owned = [*group.pages, *free._free]
        assert sorted(owned) == list(range(free.n_pages)), f"group {index}: {len(group.pages)} pages owned, {len(free)} free, of {free.n_pages}"
        bases = list(group.base)
        assert len(bases) == len(group.pages) and bases == sorted(set(bases)) and all(base % 128 == 0 for base in bases), f"group {index}: at {bases}"
        assert not sequence.length or (bases and bases[-1] == (sequence.length - 1) // 128 * 128), f"group {index}: {sequence.length} tokens, pages at {bases}"
        for page in list(free._free)[:4]:
            assert (pool.page(index, page) == 0xFF).all(), f"group {index}: page {page} was written after it was given back"
    assert 0 <= engine.held <= engine.n_ctx, f"{engine.held} tokens held of {engine.n_ctx}"
    at = [position for position in engine.positions if position >= 0]
    assert len(engine.tokens) == len(engine.positions) and at == sorted(set(at)) and (not at or at[-1] < sequence.length), "positions"
    missing = [name for name in engine.archive.files() if not (engine.archive.folder / name).exists()]
    assert not missing, f"{len(missing)} pages that a mark needs are not on disk"


# ---- who types ----


class Typist:
    """Chats until the time is over."""

    def __init__(self, model: str, seed: int, limit: int, n_ctx: int, longest: int, home: Path) -> None:
        """limit: bytes of address space. longest: tokens of an answer."""
        self.longest = longest
        self.draw, self.limit, self.home = random.Random(seed), limit, home
        self.report, self.seen = home / "report", 0
        self.counts: Counter[str] = Counter()
        self.said = self.evictions = 0
        self.sizes: list[list[int]] = []        # resident bytes before each prompt, of each process
        self.fixed = [model, "--n-ctx", str(n_ctx), "--overflow", "evict", "--threads", "1", "--offline"]
        self.environment = {**{k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "KVRUN_"))}, "TERM": "xterm-256color", "COLUMNS": "100",
                            "XDG_STATE_HOME": str(home / "state"), "XDG_CONFIG_HOME": str(home / "config"), "LANG": "C.UTF-8"}
        self.terminal = None

    def open(self) -> None:
        """A new process, which goes on with the last session where there is one."""
        from cli.terminal import Terminal

        go_on = ["-c"] if (self.home / "state/kvrun/sessions").is_dir() and self.draw.random() < 0.8 else []
        options = ["--kv", self.draw.choice(("f16", "q8", "q4", "q8/q4"))] if self.draw.random() < 0.5 else []
        arguments = [str(Path(__file__)), "--watch", str(self.report), "--memory", str(self.limit >> 20), "--", *self.fixed, *options, *go_on,
                     "--max-tokens", str(self.draw.choice((8, *3 * (self.longest,)))), "--seed", str(self.draw.randrange(1 << 30)), "--temp", "0.9"]
        self.terminal = Terminal([sys.executable, *arguments], self.environment, columns=100, rows=30)
        self.sizes.append([])
        self.counts["processes"] += 1

    def wait_prompt(self, seconds: float = 300) -> bool:
        """Until the chat has looked at itself and asks for the next line. False when it has ended instead."""
        end = time.monotonic() + seconds
        while True:
            with self.report.open("rb") as file:
                file.seek(self.seen)
                lines = file.read()
            whole = lines[: lines.rfind(b"\n") + 1]
            if whole:
                self.seen += len(whole)
                for line in whole.splitlines():
                    self.note(json.loads(line))
                return True
            if not self.terminal.read(0.05):
                return False
            if time.monotonic() > end:
                raise AssertionError(f"no prompt for {seconds:.0f} s")

    def note(self, facts: dict) -> None:
        self.facts = facts
        self.sizes[-1].append(facts["rss"])
        self.counts["prompts"] += 1
        if "reason" in facts:
            self.counts["answers"] += 1
            self.counts["interrupted"] += facts["reason"] == "interrupt"
            self.evictions += facts["evictions"]
            self.said += facts["said"]
        assert "wrong" not in facts, facts["wrong"]

    def words(self, most: int) -> str:
        start = self.draw.randrange(len(WORDS) - most)
        return " ".join(WORDS[start : start + self.draw.randrange(1, most)])

    def line(self) -> tuple[str, str]:
        """(what kind, what is typed)."""
        draw = self.draw
        if self.facts["turns"] > CLEAR:
            return "clear", "/clear"
        kind = draw.choices(("message", "long message", "interrupt", "undo", "regen", "edit", "system", "set", "read", "save", "load", "clear", "look", "odd"),
                            (40, 6, 20, 6, 6, 5, 1, 3, 2, 3, 3, 1, 4, 3))[0]
        typed = {
            "message": lambda: self.words(30), "long message": lambda: self.words(250), "interrupt": lambda: self.words(60), "undo": lambda: f"/undo {draw.choice(('', 1, 2, 5, 999))}",
            "regen": lambda: "/regen", "edit": lambda: "/edit " + self.words(20), "system": lambda: "/system " + self.words(10),
            "set": lambda: f"/set {draw.choice(('temp', 'top-p', 'min-p'))} {draw.random():.2f}", "read": lambda: f"/read {self.home / 'note.txt'}",
            "save": lambda: f"/save s{draw.randrange(6)}", "load": lambda: f"/load s{draw.randrange(6)}", "clear": lambda: "/clear",
            "look": lambda: draw.choice(("/context", "/stats", "/help", "/think hide", "/copy", "/set")),
            "odd": lambda: "/" + "".join(draw.choices(string.printable[:94], k=draw.randrange(0, 30)))}[kind]()
        return kind, typed

    def leave(self) -> None:
        """Out, in one of the ways that there are."""
        how = self.draw.choice(("exit", "end", "terminate", "kill"))
        self.counts[how] += 1
        if how == "exit":
            self.terminal.send("/exit\r")
        elif how == "end":
            self.terminal.send("\x04")
        else:
            if self.draw.random() < 0.5:
                self.terminal.send(self.words(20) + "\r")
                self.terminal.read(self.draw.random())
            self.terminal.process.kill(signal.SIGTERM if how == "terminate" else signal.SIGKILL)
        self.close({"exit": (0,), "end": (0,), "terminate": (0, 143), "kill": (0, -9)}[how], again="\x04" if how == "end" else "")

    def close(self, codes: tuple[int, ...], again: str = "") -> None:
        """again: typed until it ends. A Ctrl-D that comes before the prompt reads keys is the terminal's own, and gone."""
        end = time.monotonic() + 60
        while self.terminal.read(1):
            assert time.monotonic() < end, f"it does not end, {codes} was expected"
            self.terminal.send(again)
        code = self.terminal.closed()
        assert code in codes, f"it ended with {code}"

    def type(self) -> None:
        """One line, and what comes of it."""
        kind, typed = self.line()
        self.counts[kind] += 1
        self.terminal.send(typed + "\r")
        if kind == "interrupt":
            end = time.monotonic() + 5
            self.terminal.tail = b""
            while b"\x1b[?2004l" not in self.terminal.tail and time.monotonic() < end:  # the line was taken
                self.terminal.read(0.01)
            end = time.monotonic() + self.draw.choice((0.01, 0.05, 0.2, 1.0)) * self.draw.random()
            while time.monotonic() < end:
                self.terminal.read(0.01)
            self.terminal.send("\x03")
        assert self.wait_prompt(), "it ended"

    def begin(self) -> None:
        self.open()
        assert self.wait_prompt(), "it did not begin"

    def run(self, seconds: float, restart: float) -> None:
        """restart: how likely the process is left after a line."""
        (self.home / "note.txt").write_text(" ".join(WORDS[:300]), encoding="utf-8")
        self.report.touch()
        end = time.monotonic() + seconds
        self.begin()
        while time.monotonic() < end:
            self.type()
            if self.draw.random() < restart:
                self.leave()
                self.begin()
        self.terminal.send("/exit\r")
        self.close((0,))
        longest = max(self.sizes, key=len)
        warm = longest[min(WARM, len(longest) - 1) :]
        assert max(warm) - warm[0] < GROWTH, f"resident memory grew from {warm[0] >> 20} to {max(warm) >> 20} MiB"

    def result(self) -> dict:
        longest = max(self.sizes, key=len)
        warm = longest[min(WARM, len(longest) - 1) :]
        return {**self.counts, "evictions": self.evictions, "tokens said": self.said, "longest process": {
            "prompts": len(longest), "rss MiB": {"first": longest[0] >> 20, "warm": warm[0] >> 20, "most": max(warm) >> 20, "last": warm[-1] >> 20}}}


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--model", default="tiny", help="tiny: random weights, made here; or what `kvrun chat` takes")
    parser.add_argument("--n-ctx", type=int, default=640)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--memory", type=int, default=2048, metavar="MIB", help="address space of the chat")
    parser.add_argument("--restart", type=float, default=0.02, metavar="P", help="how likely the chat is left after a line")
    parser.add_argument("--watch", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job: the chat would ignore it too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if options.watch:
        return watch(options.watch, options.memory << 20, options.arguments)
    with tempfile.TemporaryDirectory(prefix="kvrun-soak-") as folder:
        model = options.model
        if model == "tiny":
            from engine.tiny_model import random_model

            model = str(random_model(Path(folder) / "model", options.seed % 1000, window=200 if options.seed % 2 else 0))
        longest = 600 if options.model == "tiny" else 200
        typist = Typist(model, options.seed, options.memory << 20, options.n_ctx, longest, Path(folder))
        wrong = None
        try:
            typist.run(60 * options.minutes, options.restart)
        except (AssertionError, KeyboardInterrupt) as error:
            wrong = str(error) or type(error).__name__
        print(json.dumps({"seed": options.seed, "wrong": wrong, **typist.result()}, indent=1))
        if wrong and typist.terminal is not None:
            sys.stderr.write(typist.terminal.tail.decode("utf-8", "replace"))
        if typist.terminal is not None and typist.terminal.process.isalive():
            typist.terminal.process.close(force=True)
        return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

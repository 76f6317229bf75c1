"""An engine and its conversation as the document of a session, and back."""

from __future__ import annotations

import hashlib
import json
import os
import time
from array import array
from collections.abc import Iterator, Sequence as Items
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvrun import __version__
from kvrun.cache.formats import kv_name
from kvrun.cache.pages import SequenceState
from kvrun.cache.session import FORMAT, Session, SessionStore, commit
from kvrun.cache.session_pages import DamagedPageError, Mark, PageArchive, SavedPage
from kvrun.engine.conversation import Conversation, Turn
from kvrun.errors import ContextFullError

if TYPE_CHECKING:
    from kvrun.cache.pool import Pool
    from kvrun.engine import Engine
    from kvrun.hub.files import ModelFiles
    from kvrun.text import Text

_WEIGHTS = (".safetensors", ".gguf", ".json", ".model")
_PROBE = "Grüße, 世界! The quick brown fox\n\tdef f(x): return 10 ** x  # <|im_end|> </s>\n"


def _fingerprint(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def model_identity(files: ModelFiles) -> str:
    """Stands for weights, config and revision: of every such file the name, the size and the time of its last change."""
    paths = [files.path] if files.path.is_file() else sorted(p for p in files.path.iterdir() if p.suffix in _WEIGHTS)
    stats = [(path.name, path.stat()) for path in paths]
    return _fingerprint([files.revision, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]])


def tokenizer_identity(text: Text) -> str:
    """Stands for what ids mean: the ids of a text, and the texts of ids from all over the vocabulary."""
    step = max(1, text.vocab_size // 256)
    return _fingerprint([text.vocab_size, sorted(text.special_ids), sorted(text.eos_ids), text.encode(_PROBE),
                         [text.token_text(i) for i in range(0, text.vocab_size, step)]])


def cache_identity(pool: Pool) -> str:
    """Stands for what a page's bytes mean: the layout and window of each group."""
    return _fingerprint([[asdict(memory.layout) | {"n_pages": 0}, group.window, group.kv_heads, group.head_dim, len(group.layers)]
                         for memory, group in zip(pool.groups, pool.plan_groups, strict=True)])


def pages_identity(files: ModelFiles, engine: Engine, weights: str = "auto") -> str:
    """Stands for all that a page's bytes depend on but its tokens: what a page means, and which arithmetic filled it."""
    executor = engine.executor
    return _fingerprint([model_identity(files), weights, cache_identity(engine.pool), repr(engine.spec.ropes), __version__, executor.name,
                         getattr(executor, "isa", ""), getattr(executor, "device_name", "")])


class SavedChat:
    """A conversation over an engine, kept in a session. settings: whatever else is to be found again (JSON)."""

    def __init__(self, store: SessionStore, session: Session, files: ModelFiles, engine: Engine, conversation: Conversation,
                 weights: str = "auto") -> None:
        """weights: the format that they were quantized to."""
        self.store = store
        self.session = session
        self.engine = engine
        self.conversation = conversation
        self.settings: dict[str, Any] = {}
        self.failed: str | None = None  # why pages could not be written last time
        self._created = time.time()
        self._identity = {"weights": model_identity(files) + f"-{weights}", "tokenizer": tokenizer_identity(engine.text), "cache": cache_identity(engine.pool),
                          "template": _fingerprint(engine.text.templates), "ropes": _fingerprint(repr(engine.spec.ropes))}
        self._model = {"name": files.name, "call": str(files.path.resolve()) if files.source == "local" else files.name, "path": str(files.path),
                       "revision": files.revision, "kv": kv_name(engine.pool.kv), "n_ctx": engine.n_ctx, "weights": weights}
        self._archive = engine.archive = PageArchive(session.pages, engine.pool, engine.sequence)

    # ---- saving ----

    def save(self) -> None:
        """Writes what changed of the pages, then the document. OSError; the old session is then still whole."""
        archive = self._archive
        self.failed = None
        self.engine.mark()
        if archive.failed:
            self.failed, archive.failed = archive.failed, None
            archive.marks, archive.saved = [], {}
        commit(self.session, archive, self._document)

    def move_to(self, session: Session) -> None:
        """From now on the session is `session`, a new one, which gets all that this one has. OSError."""
        archive = self._archive
        for name in archive.files():
            os.link(archive.folder / name, session.pages / name)
        archive.folder = session.pages
        self.session = session

    def _document(self) -> dict[str, Any]:
        archive, engine = self._archive, self.engine
        needed = archive.files()
        return {
            "format": FORMAT, "created": self._created, "saved": time.time(), "model": self._model, "identity": self._identity,
            "system": self.conversation.system, "turns": list(_packed(self.conversation.turns)), "settings": self.settings,
            "tokens": engine.tokens, "positions": list(_runs(engine.positions)),
            "drawn": list(_runs([i for i, kind in enumerate(engine.history.drawn[: len(engine.tokens)]) if kind])),
            "marks": [[m.count, m.state.length, [list(_runs([b // 128 for b in bases])) for bases in m.state.bases],
                       m.state.evicted, m.state.turns, m.side] for m in archive.marks],
            "pages": [[group, base, page.rows, page.file] for (group, base), page in archive.saved.items() if page.file in needed],
        }

    # ---- resuming ----

    def resume(self) -> list[str]:
        """Takes on the session's document. Returns what the user must be told: nothing where the cache came back as it was."""
        document = self.session.document
        told: list[str] = []
        self._created = document["created"]
        self.settings = document["settings"]
        conversation, identity = self.conversation, document["identity"]
        conversation.system = document["system"]
        conversation.turns = list(_unpacked(document["turns"]))
        name = self.session.name
        lists = [document["tokens"], *(ids for turn in document["turns"] for ids in (turn["read"], turn["said"]))]
        strange = max(max(ids, default=0) for ids in lists) >= self.engine.spec.vocab_size
        if strange or identity["tokenizer"] != self._identity["tokenizer"] or identity["template"] != self._identity["template"]:
            for turn in conversation.turns:
                turn.read, turn.said, turn.plain = [], [], []
            other = "model" if strange or identity["weights"] != self._identity["weights"] else "chat template"
            return [f"session {name} was saved with another {other} ({document['model']['name']}): its conversation is read again with "
                    "the next message"]
        for part, what in (("weights", f"another model ({document['model']['name']})"), ("ropes", "another position encoding"),
                           ("cache", f"another cache format ({document['model']['kv']})")):
            if identity[part] != self._identity[part]:
                return [f"session {name} was saved with {what}: its conversation is read again with the next message"]
        drawn = bytearray(len(document["tokens"]))
        for first, n in document.get("drawn", ()):
            drawn[first : first + n] = b"\1" * n
        self.engine.history.set(document["tokens"], drawn)
        if not document["marks"]:
            if conversation.turns:
                told.append(f"the cache of session {name} is no longer on disk: its conversation is read again with the next message")
            return told
        positions = array("q", _flat(document["positions"]))
        try:
            self._archive.marks = [self._mark(fields, positions) for fields in document["marks"]]
            self._archive.saved = {(group, base): SavedPage(file, rows) for group, base, rows, file in document["pages"]}
            self.engine.resume(document["tokens"], positions, self._archive.marks[-1])
        except (DamagedPageError, ContextFullError) as error:
            self._archive.marks, self._archive.saved = [], {}
            told.append(f"session {name}: {error}; its conversation is read again with the next message")
        return told

    def _mark(self, fields: Items[Any], positions: Items[int]) -> Mark:
        """DamagedPageError for one that is none of this sequence's."""
        count, length, groups, evicted, turns, side = fields
        state = SequenceState(length, tuple(tuple(128 * page for page in _flat(runs)) for runs in groups), tuple(evicted), tuple(turns))
        if positions[count - 1] != length - 1 or not self.engine.sequence.could_hold(state):
            raise DamagedPageError(f"{self.session.folder}: what it says of the cache does not agree with itself")
        return Mark(count, state, side)


def _runs(values: Items[int]) -> Iterator[list[int]]:
    """[first, how many] of each run of consecutive numbers."""
    first, n = 0, 0
    for value in values:
        if n and value == first + n:
            n += 1
            continue
        if n:
            yield [first, n]
        first, n = value, 1
    if n:
        yield [first, n]


def _flat(runs: Items[Items[int]]) -> Iterator[int]:
    for first, n in runs:
        yield from range(first, first + n)


def _packed(turns: Items[Turn]) -> Iterator[dict[str, Any]]:
    """Of what a turn read only what the turn before it had not read and said."""
    before: list[int] = []
    for turn in turns:
        same = next((i for i, (a, b) in enumerate(zip(before, turn.read, strict=False)) if a != b), min(len(before), len(turn.read)))
        yield {"user": turn.user, "assistant": turn.assistant, "same": same, "read": turn.read[same:], "said": turn.said}
        before = turn.read + turn.said


def _unpacked(turns: Items[dict[str, Any]]) -> Iterator[Turn]:
    before: list[int] = []
    for turn in turns:
        read = before[: turn["same"]] + turn["read"]
        yield Turn(turn["user"], turn["assistant"], read, turn["said"])
        before = read + turn["said"]

"""What kvrun wrote itself and reads again (anybody may have changed it), what a user types, and what a model says."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

import kvrun.backends.cpu  # noqa: F401 - loaded here, so that the fuzzer sees its branches
import kvrun.terminal.lines  # noqa: F401
from kvrun.backends.batch import Sampler
from kvrun.backends.memory import Arena
from kvrun.cache.prompt_cache import PromptCache
from kvrun.cache.session import DamagedSessionError, SessionStore, read_document
from kvrun.cache.session_pages import DamagedPageError, read_array, write_array
from kvrun.cli import options as opt
from kvrun.cli.chat import ChatOptions, _sampler
from kvrun.cli.chat_loop import Chat
from kvrun.cli.session import _described, messages
from kvrun.cli.slash import completions, dispatch
from kvrun.engine.conversation import Conversation
from kvrun.engine.saved import SavedChat
from kvrun.errors import ModelError, UsageError
from kvrun.hub import resolve
from kvrun.runtime import open_engine
from kvrun.terminal import Console, streams
from kvrun.terminal.sanitize import Sanitizer, json_safe, one_line, visible
from kvrun.weights.kept import KeptWeights

from ..engine.tiny_model import random_model
from .target import Target, place

_PROMPT = [7 * i % 256 for i in range(300)]


@cache
def _model() -> Path:
    return random_model(place("model"), 1, layers=2)


@cache
def _files():
    return resolve(str(_model()))


@cache
def _engine():
    return open_engine(_files(), device="cpu", n_ctx=512, kv="q8", threads=1)


def _forgotten():
    """The engine as in a new process."""
    engine = _engine()
    engine.archive = None
    engine._keep_common_prefix([])
    engine.history.set([], [])
    return engine


def _options() -> ChatOptions:
    return ChatOptions(opt.ModelOptions(str(_model())), opt.OverflowOptions(), opt.SamplingOptions(max_tokens=2), opt.OutputOptions(), None, False)


def _say(ids: list[int], n: int = 3) -> tuple[str, list[int]]:
    tokens = [event for event in _engine().generate(ids, max_tokens=n) if hasattr(event, "id")]
    return "".join(token.text for token in tokens), [token.id for token in tokens]


# ---- sessions ----


def _chat(store: SessionStore, name: str) -> SavedChat:
    engine = _forgotten()
    session = store.open(name)
    try:
        session.read()
        return SavedChat(store, session, _files(), engine, Conversation(engine.text, "be brief"))
    except BaseException:
        session.close()
        raise


@cache
def _saved_session() -> Path:
    """A session of two turns, as kvrun saves it."""
    store = SessionStore(place("session-made"))
    saved = _chat(store, "made")
    for message in ("first " * 30, "second"):
        saved.conversation.answered(*_say(saved.conversation.ask(message)))
        saved.settings = {"sampler": {"temperature": 0.5, "seed": 3}}
        saved.save()
    saved.session.close()
    return saved.session.folder


def _sealed(data: bytes) -> bytes:
    """With the checksum that the change would have been given by whoever made it."""
    try:
        body = json.dumps(json.loads(data), ensure_ascii=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        return data
    return f'{{"sha256":"{hashlib.sha256(body.encode()).hexdigest()}","session":{body}}}\n'.encode()


def _session(data: bytes) -> None:
    """Listed, shown, exported, and gone on with."""
    store = SessionStore(place("sessions"))
    folder = store.root / "s"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(_saved_session(), folder)
    (folder / "session.json").write_bytes(_sealed(data))
    for info in store:
        json.dumps(_described(info))
        " ".join(f"{value}" for value in _described(info).values())
    document = read_document(folder)
    messages(document)
    saved = _chat(store, "s")
    try:
        saved.resume()
        _sampler(_options(), _files(), saved.session)
        saved.conversation.answered(*_say(saved.conversation.ask("more")))
        saved.save()
    finally:
        saved.session.close()


def _made_sessions() -> list[bytes]:
    return [json.dumps(read_document(_saved_session())).encode()]


# ---- pages ----


@cache
def _page() -> np.ndarray:
    return np.arange(1024, dtype=np.uint16).view(np.uint8)


def _page_file(data: bytes) -> None:
    folder = place("page")
    name, _ = write_array(folder, _page())
    into = np.zeros(2048, np.uint8)
    (folder / name).write_bytes(data)
    try:
        read_array(folder, name, into)
    except DamagedPageError:
        assert not (folder / name).exists()
        raise
    assert (into == _page()).all()


def _made_pages() -> list[bytes]:
    folder = place("page-made")
    name, _ = write_array(folder, _page())
    return [(folder / name).read_bytes()]


def _prompt_cache(root: Path) -> PromptCache:
    return PromptCache("identity", _forgotten(), root=root)


@cache
def _saved_prompt() -> tuple[Path, np.ndarray]:
    """Where the pages of a prompt were kept, and the first of them."""
    root = place("prompts-made")
    cache_ = _prompt_cache(root)
    cache_.load(_PROMPT)
    _say(_PROMPT, 1)
    cache_.keep()
    cache_.save()
    return root, _first_page().copy()


def _first_page() -> np.ndarray:
    """As it is in the engine's cache."""
    return _engine().pool.page(0, _engine().sequence.tables()[0].pages[0])


def _prompt(data: bytes) -> None:
    """One page of two is changed: what was kept is taken, or computed anew, and the answer is the same. Not where the checksum in the file
    was changed with the page, which the fuzzer learns to do: it sees what that is compared with."""
    (kept, page), root = _saved_prompt(), place("prompts")
    shutil.rmtree(root)
    shutil.copytree(kept, root)
    sorted((root / "identity").iterdir())[0].write_bytes(data)
    cache_ = _prompt_cache(root)
    if cache_.load(_PROMPT) and (_first_page() != page).any():
        return
    assert _say(_PROMPT, 2) == _expected()
    cache_.keep()
    cache_.save()


@cache
def _expected() -> tuple[str, list[int]]:
    _prompt_cache(place("nothing"))
    return _say(_PROMPT, 2)


def _made_prompts() -> list[bytes]:
    return [sorted((_saved_prompt()[0] / "identity").iterdir())[0].read_bytes()]


# ---- packed weights ----


def _kept(path: Path) -> tuple[KeptWeights, Arena]:
    return KeptWeights(path, b"k" * 32), Arena(8192, "a test")


def _packed(data: bytes) -> None:
    kept, arena = _kept(place("packed") / "m.packed")
    kept.path.write_bytes(data)
    if kept.read(arena, 2):
        assert len(data) == 4096 + 8192 and (arena.bytes == np.frombuffer(data, np.uint8)[4096:]).all()


def _made_packed() -> list[bytes]:
    kept, arena = _kept(place("packed-made") / "m.packed")
    arena.bytes[:] = np.arange(8192) % 251
    assert kept.write(arena) is None
    return [kept.path.read_bytes()]


# ---- what is typed ----


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing that a command says is shown."""
    before = streams.STDOUT, streams.STDERR
    nowhere = os.open(os.devnull, os.O_WRONLY)
    streams.STDOUT = streams.STDERR = nowhere
    try:
        yield
    finally:
        streams.STDOUT, streams.STDERR = before
        os.close(nowhere)


def _slash(data: bytes) -> None:
    """Lines that begin with a slash, one after the other, in a chat of two turns."""
    store = SessionStore(place("slash"))
    shutil.rmtree(store.root)
    engine = _forgotten()
    with _silent():
        chat = Chat(_options(), Console(), _files(), engine, Conversation(engine.text), Sampler(), store, store.open("begun"), True, "auto")
        try:
            chat.start(None)
            chat.take_turn("one")
            chat.take_turn("two")
            for line in data.decode("utf-8", "replace").split("\n")[:8]:
                line = "/" + line.removeprefix("/")
                chat.max_tokens = min(chat.max_tokens or 2, 2)
                list(zip(range(100), completions(chat, line)))
                if not _unwise(line):
                    chat._obey(line, dispatch)
            chat.max_tokens = 2
            chat.take_turn("three")
        finally:
            chat.session.close()


def _unwise(line: str) -> bool:
    """Whether it reads a file of the system that has no end or waits for somebody."""
    return bool(re.match(r"/read\s+[/~.]*(dev|proc|sys)?\b", line)) and any(word in line for word in ("dev", "proc", "sys"))


# ---- what is said ----

_EXECUTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff]")


def _sanitizer(data: bytes) -> None:
    """No character that a terminal obeys comes out, wherever the text is cut, and JSON keeps its meaning."""
    text = data[1:].decode("utf-8", "surrogatepass" if data[:1] < b"\x80" else "replace") if _decodes(data) else data[1:].decode("latin-1")
    step = data[0] % 7 + 1 if data else 1
    stream = Sanitizer()
    out = "".join(stream.push(text[i : i + step]) for i in range(0, len(text), step)) + stream.flush()
    whole = Sanitizer()
    assert out == whole.push(text) + whole.flush()
    for shown in (out, visible(text), one_line(text)):
        assert not _EXECUTED.search(shown), ascii(shown)
        shown.encode()
    assert "\n" not in one_line(text) and "\t" not in one_line(text)
    safe = json_safe(json.dumps({"text": text}, ensure_ascii=False))
    assert not re.search("[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", safe)
    assert json.loads(safe) == {"text": text}


def _decodes(data: bytes) -> bool:
    try:
        data[1:].decode("utf-8", "surrogatepass")
        return True
    except UnicodeDecodeError:
        return False


TARGETS = [
    Target("session", _session, (DamagedSessionError, UsageError, ModelError), "json", _made_sessions),
    Target("page", _page_file, (DamagedPageError,), "binary", _made_pages),
    Target("prompt_cache", _prompt, (), "binary", _made_prompts),
    Target("packed", _packed, (), "binary", _made_packed),
    Target("slash", _slash, (), "lines"),
    Target("sanitizer", _sanitizer, (), "binary"),
]

"""Sessions on disk: one process at a time, the old or the new, and a limit."""

import os
import random
import signal
import time

import numpy as np
import pytest

from kvrun.backends.plan import CacheGroup
from kvrun.cache import session as sessions
from kvrun.cache.pool import Pool
from kvrun.cache.session import DamagedSessionError, SessionStore, commit, read_document
from kvrun.cache.session_pages import PageArchive
from kvrun.errors import NotFoundError, UsageError

from .documents import document

GROUPS = (CacheGroup(window=0, layers=(0, 2), kv_heads=1, head_dim=16), CacheGroup(window=200, layers=(1,), kv_heads=1, head_dim=16))


@pytest.fixture
def rng():
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture
def store(tmp_path):
    return SessionStore(tmp_path / "sessions")


def new_pool(kv=("q8", "q4")):
    return Pool(GROUPS, n_ctx=2048, chunk=128, kv=kv)


def save_for_ever(store, seed):
    """What a chat does, as fast as it can: tokens come, pages fill, now and then some are taken back, and each time all is saved."""
    draw = np.random.default_rng(seed)
    pool = new_pool()
    sequence, session = pool.sequence(), store.open("s")
    archive = PageArchive(session.pages, pool, sequence)
    for step in range(1 << 30):
        if sequence.length > 1500 or (sequence.length > 300 and draw.random() < 0.2):
            sequence.truncate(0)
            archive.rewound(0)
        sequence.extend(int(draw.integers(1, 129 - sequence.length % 128)))
        for group in range(len(GROUPS)):
            table = sequence.tables()[group]
            pool.page(group, table.pages[-1])[:] = draw.integers(0, 256, pool.groups[group].page_stride, dtype=np.uint8)
            pool.groups[group].side[:64] = draw.integers(0, 256, 64, dtype=np.uint8)
        archive.mark(step + 1, whole=True)
        assert archive.failed is None
        commit(session, archive, lambda step=step: document(step=step, needed=sorted(archive.files())))


def test_killed_at_any_moment_it_is_the_old_or_the_new(store, rng, tmp_path):
    """200 kills -9. Whatever a document names is there, whole; and each process goes on where the last one was killed."""
    from kvrun.cache.session_pages import digest

    import safetensors.numpy  # noqa: F401 - loaded once, not in every child

    saved = 0
    for _ in range(200):
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(store, rng.getrandbits(32))
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.02, 0.1))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child failed before it was killed"
        session = store.open("s")
        found = session.read()
        for name in found.get("needed", ()):
            data = (session.pages / name).read_bytes()
            body = np.frombuffer(data[8 + int.from_bytes(data[:8], "little"):], np.uint8)
            assert digest(body) + ".safetensors" == name
        saved += bool(found)
        session.close()
        rng.random()
    assert saved > 100
    assert len(list(store.root.iterdir())) == 1


def test_one_process_at_a_time(store):
    session = store.open("one")
    session.write(document())
    child = os.fork()
    if child == 0:
        try:
            store.open("one")
        except UsageError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with pytest.raises(UsageError, match="open in another process"):
        store.remove("one")
    session.close()
    store.open("one").close()


def test_what_was_never_saved_leaves_nothing(store):
    store.open("empty").close()
    assert list(store) == [] and not (store.root / "empty").exists()


@pytest.mark.parametrize("harm", [b"", b"{", b"[]", b'{"sha256":"0","session":{"format":1}}', b"\xff\xfe", b'{"session":' + b"[" * 100_000])
def test_a_damaged_document_is_put_aside(store, harm):
    session = store.open("s")
    session.write(document(text="äöü"))
    assert read_document(session.folder) == document(text="äöü")
    (session.folder / "session.json").write_bytes(harm)
    with pytest.raises(DamagedSessionError, match="session.json"):
        session.read()
    assert [info.damaged for info in store] == [True]
    aside = session.quarantine()
    assert (aside / "session.json").read_bytes() == harm and list(store) == []
    session.write(document())
    session.close()
    assert [info.name for info in store] == ["s"]


def test_names(store):
    for bad in ("", ".", "..", "a/b", "-x", ".hidden", "x" * 65, "a b", "é"):
        with pytest.raises(UsageError, match="no name of a session"):
            store.open(bad)
    with pytest.raises(NotFoundError, match="none yet"):
        store.info("absent")
    with pytest.raises(NotFoundError, match="no session to continue"):
        store.last()


def test_the_session_used_longest_ago_loses_its_pages_first(store):
    for age, name in enumerate(("new", "middle", "old")):
        session = store.open(name)
        session.write(document())
        (session.pages / "page").write_bytes(bytes(1000))
        os.utime(session.folder / "session.json", (1000 - age, 1000 - age))
        session.close()
    assert store.last() == "new"
    total = sum(info.n_bytes for info in store)
    store.limit = total
    assert store.trim("new") == []
    store.limit = total - 1
    assert store.trim("new") == ["old"]
    store.limit = 0
    held = store.open("middle")
    assert store.trim("new") == []
    held.close()
    assert store.trim("new") == ["middle"]
    assert {info.name: info.page_bytes for info in store} == {"new": 1000, "middle": 0, "old": 0}


def test_a_full_disk_leaves_the_old_session(store, monkeypatch):
    session = store.open("s")
    session.write(document(turn=1))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sessions.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        session.write(document(turn=2))
    monkeypatch.undo()
    assert read_document(session.folder)["turn"] == 1
    assert sorted(path.name for path in session.folder.iterdir()) == ["lock", "pages", "session.json"]

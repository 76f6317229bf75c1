"""Sessions on disk: one process at a time, what is damaged, and a limit. Those that are killed while they save are in tests/faults."""

import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from kvrun.cache import session as sessions
from kvrun.cache.session import DamagedSessionError, SessionStore, read_document
from kvrun.errors import NotFoundError, UsageError

from .documents import document


@pytest.fixture
def store(tmp_path):
    return SessionStore(tmp_path / "sessions")


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


def test_sessions_begun_in_the_same_moment(store):
    with ThreadPoolExecutor(8) as pool:
        together = Barrier(8)
        for _ in range(20):
            begun = list(pool.map(lambda _: (together.wait(), store.new())[1], range(8)))
            assert len({session.name for session in begun}) == 8
            for session in begun:
                session.close()


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

"""Saved conversations: a folder each, with one JSON document and the cache pages that it names.

The document is replaced by a rename after every page that it names is on the disk, and pages that no document names are removed after
that. So a process that is killed at any moment leaves the old session or the new one. One process at a time has a session open.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrun.cache.session_document import FORMAT, MAX_BYTES, check_document
from kvrun.cache.session_pages import sync_file
from kvrun.errors import KvrunError, NotFoundError, StorageError, UsageError

if TYPE_CHECKING:
    from kvrun.cache.session_pages import PageArchive

LIMIT = 4 << 30
"""Bytes that all sessions together may take by default."""
_DOCUMENT, _PAGES, _LOCK = "session.json", "pages", "lock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class DamagedSessionError(KvrunError):
    """The document is not one that this program wrote."""

    exit_code = 9


@dataclass(frozen=True)
class SessionInfo:
    """A session as `kvrun session ls` shows it. used: seconds since 1970. damaged: its document cannot be read."""

    name: str
    used: float
    n_bytes: int
    page_bytes: int
    document: dict[str, Any]
    damaged: bool = False


def sessions_dir() -> Path:
    """Where sessions lie."""
    import platformdirs

    return Path(platformdirs.user_state_dir("kvrun", appauthor=False)) / "sessions"


def check_name(name: str) -> str:
    """UsageError for a name that cannot be a folder's."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name of a session: use letters, digits, '.', '_' and '-', at most 64 of them")
    return name


class Session:
    """One session, locked for this process until close(). document: what was saved last, {} for a new one."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder if it is not there. UsageError when another process has it open; StorageError."""
        self.folder = folder
        try:
            self.pages.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.chmod(folder, 0o700)
            self._lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise StorageError(f"{error.filename}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise UsageError(f"session {self.name} is open in another process; choose another one with --session NAME") from None
        for partial in folder.glob(".*"):  # of a process that was killed
            partial.unlink(missing_ok=True)
        self.document: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def pages(self) -> Path:
        """Where its pages lie."""
        return self.folder / _PAGES

    def read(self) -> dict[str, Any]:
        """Reads the document; {} when there is none yet. DamagedSessionError."""
        self.document = read_document(self.folder)
        return self.document

    def write(self, document: dict[str, Any]) -> None:
        """Replaces the document, whole or not at all. OSError."""
        write_document(self.folder, document)
        self.document = document

    def quarantine(self) -> Path:
        """Puts the session aside and makes an empty one in its place. Returns where the old one lies."""
        aside = next(path for i in range(1000) if not (path := self.folder.with_name(f".damaged-{self.name}-{i}")).exists())
        os.close(self._lock)
        self.folder.rename(aside)
        self.__init__(self.folder)
        return aside

    def close(self) -> None:
        """Gives the lock back; a session that was never saved, or was removed, leaves nothing behind. Idempotent."""
        if self._lock >= 0:
            if not (self.folder / _DOCUMENT).exists():
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def commit(session: Session, archive: PageArchive, document: Callable[[], dict[str, Any]]) -> None:
    """Saves what `archive` has marked: first what is new of the pages outlives this process, then the document that names them, then what nobody names goes. OSError;
    the old session is then still whole."""
    archive.sync()
    session.write(document())
    archive.collect()


def write_document(folder: Path, document: dict[str, Any]) -> None:
    """Writes beside, syncs, renames, syncs the folder. OSError."""
    body = json.dumps(document, ensure_ascii=True, separators=(",", ":"))
    text = f'{{"sha256":"{hashlib.sha256(body.encode()).hexdigest()}","session":{body}}}\n'
    partial = folder / f".{os.getpid()}-{_DOCUMENT}"
    try:
        with open(os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / _DOCUMENT)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_file(folder)


def read_document(folder: Path) -> dict[str, Any]:
    """The document of a session's folder, {} when there is none. DamagedSessionError."""
    path = folder / _DOCUMENT
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
        outer = json.loads(data)
        body = json.dumps(outer["session"], ensure_ascii=True, separators=(",", ":"))
        if hashlib.sha256(body.encode()).hexdigest() != outer["sha256"]:
            raise ValueError("its checksum is another one")
        return check_document(outer["session"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedSessionError(f"{path}: not a session: {getattr(error, 'strerror', None) or str(error)[:200]}") from None


class SessionStore:
    """All sessions of this user. limit: bytes that they may take together."""

    def __init__(self, root: Path | None = None, limit: int = LIMIT) -> None:
        self.root = root or sessions_dir()
        self.limit = limit

    def __iter__(self):
        """SessionInfo of every session, the one used last first."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for folder in self.root.iterdir():
                if _NAME.fullmatch(folder.name) and (folder / _DOCUMENT).exists():
                    found.append(self._info(folder))
        return iter(sorted(found, key=lambda info: info.used, reverse=True))

    def _info(self, folder: Path) -> SessionInfo:
        pages = _size(folder / _PAGES)
        try:
            document, damaged = read_document(folder), False
        except DamagedSessionError:
            document, damaged = {}, True
        with contextlib.suppress(OSError):
            return SessionInfo(folder.name, (folder / _DOCUMENT).stat().st_mtime, pages + (folder / _DOCUMENT).stat().st_size, pages,
                               document, damaged)
        return SessionInfo(folder.name, 0.0, pages, pages, document, damaged)

    def info(self, name: str) -> SessionInfo:
        """One session. NotFoundError."""
        if not (self.root / check_name(name) / _DOCUMENT).exists():
            near = ", ".join(info.name for info in list(self)[:5]) or "none yet"
            raise NotFoundError(f"no session is named {name}; there are: {near}")
        return self._info(self.root / name)

    def last(self) -> str:
        """The name of the session used last. NotFoundError."""
        for info in self:
            return info.name
        raise NotFoundError("there is no session to continue; 'kvrun chat' begins one")

    def open(self, name: str) -> Session:
        """Opens a session, or makes a new one of that name. UsageError, StorageError."""
        return Session(self.root / check_name(name))

    def new(self) -> Session:
        """A new session, named by the time; also where another process begins one in the same moment. StorageError."""
        stamp = time.strftime("%Y-%m-%d-%H%M%S")
        for i in itertools.count():
            folder = self.root / (f"{stamp}-{i}" if i else stamp)
            if not folder.exists():
                with contextlib.suppress(UsageError):
                    return Session(folder)

    def remove(self, name: str) -> None:
        """Removes a session. NotFoundError; UsageError while a process has it open."""
        self.info(name)
        session = self.open(name)
        try:
            (session.folder / _DOCUMENT).unlink(missing_ok=True)
        finally:
            session.close()

    def trim(self, keep: str) -> list[str]:
        """Removes the pages of the sessions used longest ago until all fit into the limit; their conversations stay. Returns their
        names. keep: a session that is left alone, as are those that a process has open. OSError."""
        infos = list(self)
        total, trimmed = sum(info.n_bytes for info in infos), []
        for info in reversed(infos):
            if total <= self.limit:
                break
            if info.name == keep or not info.page_bytes:
                continue
            try:
                session = self.open(info.name)
            except UsageError:
                continue
            try:
                with contextlib.suppress(DamagedSessionError):
                    session.write(session.read() | {"marks": [], "pages": []})
                    os.utime(session.folder / _DOCUMENT, (info.used, info.used))
                for entry in os.scandir(session.pages):
                    os.unlink(entry.path)
            finally:
                session.close()
            total -= info.page_bytes
            trimmed.append(info.name)
        return trimmed


def _size(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    return 0

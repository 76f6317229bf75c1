"""Pages of one sequence on disk, as they lie in memory: what a rewind, a resumed session or another process reads back.

A full page never changes, so it is written once. Pages of a sliding window that the sequence has given up stay on disk for as long as
a mark, a place to which the sequence may be taken back, needs them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvrun.cache.formats import PAGE
from kvrun.cache.pages import Sequence, SequenceState
from kvrun.cache.pool import Pool
from kvrun.errors import StorageError

MARKS = 64
"""How many places a sequence can be taken back to: two for each turn of a chat."""
_SUFFIX = ".safetensors"
_HEADER_LIMIT = 1 << 16


class DamagedPageError(StorageError):
    """A page on disk is not what was written there, or is not there."""


@dataclass(frozen=True)
class Mark:
    """A place to come back to. count: tokens that were read and said up to it. side: its side memory's file, None without one."""

    count: int
    state: SequenceState
    side: str | None = None


@dataclass(frozen=True)
class SavedPage:
    """rows: how many of the page's token slots the file has right."""

    file: str
    rows: int


def digest(data: np.ndarray) -> str:
    """The name of a page: 40 hex digits of its SHA-256."""
    return hashlib.sha256(data).hexdigest()[:40]


def write_array(folder: Path, data: np.ndarray) -> tuple[str, bool]:
    """Puts uint8 [n] into a safetensors file of `folder` that is named by its content. Returns its name, and whether it is new.
    It appears whole or not at all; `sync` makes it last. OSError."""
    from safetensors.numpy import save

    name = digest(data) + _SUFFIX
    path = folder / name
    if path.exists():
        return name, False
    partial = folder / f".{os.getpid()}-{name}"
    try:
        descriptor = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        with open(descriptor, "wb") as file:
            file.write(save({"data": data}))
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return name, True


def read_array(folder: Path, name: str, into: np.ndarray) -> None:
    """Reads what `write_array` wrote into uint8 [n]. DamagedPageError when it is not that; the file is then removed, so that its name,
    which stands for its content, can be written again."""
    path = folder / name
    try:
        _read(path, into)
        if digest(into) + _SUFFIX != name:
            raise DamagedPageError(f"{path}: its content has changed")
    except DamagedPageError:
        with contextlib.suppress(OSError):  # on a disk that cannot be written it stays
            path.unlink()
        raise


def _read(path: Path, into: np.ndarray) -> None:
    try:
        with open(path, "rb", buffering=0) as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= _HEADER_LIMIT else {}
            if header.get("data", {}).get("shape") != [len(into)] or file.readinto(memoryview(into)) != len(into):
                raise DamagedPageError(f"{path}: not the page that was saved here")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DamagedPageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


class PageArchive:
    """The pages of one sequence in `folder`, which is there. marks: ascending by count; those that a rewind made void are gone.

    failed: why nothing is written any more (a full disk), None while all is well.
    """

    def __init__(self, folder: Path, pool: Pool, sequence: Sequence) -> None:
        self.folder = folder
        self.marks: list[Mark] = []
        self.saved: dict[tuple[int, int], SavedPage] = {}
        self.failed: str | None = None
        self._pool = pool
        self._sequence = sequence
        self._new: list[str] = []

    # ---- told by the engine ----

    def rewound(self, length: int) -> None:
        """What was saved of positions from `length` on is void."""
        for (group, base), page in list(self.saved.items()):
            if base >= length:
                del self.saved[group, base]
            elif base + page.rows > length:
                self.saved[group, base] = SavedPage(page.file, length - base)
        self.marks = [mark for mark in self.marks if mark.state.length <= length]

    def mark(self, count: int, length: int | None = None, *, whole: bool = False) -> None:
        """Makes the first `length` positions (None: all) a place to come back to, where `count` tokens have been read and said.
        Pages that the sequence may give up meanwhile are written now; whole: all of them."""
        if self.failed is not None or (self.marks and self.marks[-1].count == count and not whole):
            return
        try:
            state = self._sequence.state(length)
            for group, (table, bases) in enumerate(zip(self._sequence.tables(), state.bases, strict=True)):
                if whole or self._sequence.evicts or self._pool.plan_groups[group].window:
                    pages = dict(zip(table.base, table.pages, strict=True))
                    for base in bases:
                        self._write(group, base, pages[base], min(PAGE, self._sequence.length - base))
            self.marks = [mark for mark in self.marks if mark.count < count][1 - MARKS :] + [Mark(count, state, self._write_side())]
        except OSError as error:
            self.failed = f"{self.folder}: {error.strerror or error}"

    def _write(self, group: int, base: int, page: int, rows: int) -> None:
        known = self.saved.get((group, base))
        if known is None or known.rows < rows:
            self.saved[group, base] = SavedPage(self._put(self._pool.page(group, page)), rows)

    def _write_side(self) -> str | None:
        side = self._pool.sides()
        return self._put(np.concatenate(side)) if side else None

    def _put(self, data: np.ndarray) -> str:
        name, new = write_array(self.folder, data)
        if new:
            self._new.append(name)
        return name

    def best(self, count: int) -> Mark | None:
        """The last mark with at most `count` tokens."""
        return next((mark for mark in reversed(self.marks) if mark.count <= count), None)

    def load(self, mark: Mark) -> None:
        """Takes the sequence to `mark`: pages that it still holds stay, others are read. DamagedPageError, after which the sequence
        holds nothing of use; ContextFullError with nothing changed."""
        missing = self._sequence.adopt(mark.state)
        work = []
        for group, base, page in missing:
            saved = self.saved.get((group, base))
            if saved is None or saved.rows < min(PAGE, mark.state.length - base):
                raise DamagedPageError(f"{self.folder}: the page of position {base} is not here")
            work.append((saved.file, group, page, self._pool.page(group, page)))
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as threads:  # hashing costs more than reading
            list(threads.map(lambda job: read_array(self.folder, job[0], job[3]), work))
        for _, group, page, data in work:
            self._pool.put_page(group, page, data)
        side = self._pool.sides()
        if side:
            whole = np.empty(sum(map(len, side)), np.uint8)
            read_array(self.folder, mark.side or "none", whole)
            for part in side:
                part[:], whole = whole[: len(part)], whole[len(part) :]
            self._pool.put_sides(side)

    # ---- files ----

    def files(self) -> set[str]:
        """Names of the files that some mark needs."""
        names = {mark.side for mark in self.marks if mark.side}
        for mark in self.marks:
            for group, bases in enumerate(mark.state.bases):
                names |= {self.saved[group, base].file for base in bases if (group, base) in self.saved}
        return names

    def sync(self) -> None:
        """What was written since the last time outlives a power cut. OSError."""
        for name in self._new:
            sync_file(self.folder / name)
        if self._new:
            sync_file(self.folder)
        self._new.clear()

    def collect(self) -> None:
        """Removes what no mark needs."""
        needed = self.files()
        self.saved = {place: page for place, page in self.saved.items() if page.file in needed}
        remove_others(self.folder, needed)


def sync_file(path: Path) -> None:
    """fsync of a file or a folder. OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_others(folder: Path, needed: Iterable[str]) -> None:
    """Removes every file of `folder` but those named. OSError."""
    keep = set(needed)
    for entry in os.scandir(folder):
        if entry.name not in keep:
            Path(entry.path).unlink(missing_ok=True)

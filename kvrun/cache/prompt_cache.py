"""Pages of prompts on disk, for runs that begin alike: a long file, a system prompt.

A page is named by a hash of all tokens up to its end and of everything its bytes depend on, so a page that is there is the right one,
whoever wrote it. Only pages that prefill filled are kept: what is computed for a prompt does not depend on chunks or threads, and so an
answer is the same with this cache and without it. Files appear whole or not at all, and any number of processes may read, write and
remove them at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from array import array
from collections.abc import Sequence as Items
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvrun.cache.formats import PAGE, SHORTEST_KEPT
from kvrun.cache.pages import SequenceState
from kvrun.cache.session_pages import DamagedPageError, digest
from kvrun.errors import ContextFullError

if TYPE_CHECKING:
    from kvrun.cache.pool import Pool
    from kvrun.engine import Engine

LIMIT = 2 << 30
"""Bytes that all prompts together may take."""
_CLOCKS = 60  # seconds by which the clock of a file server may be ahead of ours


def prompts_dir() -> Path:
    """Where pages of prompts lie: in the user's cache directory, or KVRUN_CACHE."""
    if place := os.environ.get("KVRUN_CACHE"):
        return Path(place).expanduser() / "prompts"
    import platformdirs

    return Path(platformdirs.user_cache_dir("kvrun", appauthor=False)) / "prompts"


class PromptCache:
    """Pages of one model in one cache format. identity: stands for all that a page's bytes depend on but its tokens."""

    def __init__(self, identity: str, engine: Engine, *, root: Path | None = None, limit: int = LIMIT) -> None:
        self.root = root or prompts_dir()
        self.limit = limit
        self._identity = identity
        self._engine = engine
        self._pool: Pool = engine.pool
        self._folder = self.root / identity
        self._windows = [group.window for group in self._pool.plan_groups]
        self._n_sides = sum(bool(group.side_stride) for group in self._pool.groups)
        self._keys: list[str] = []
        self._copies: list[tuple[str, np.ndarray]] = []

    def _name(self, page: int, group: int | str) -> str:
        return f"{self._keys[page]}-{group}.safetensors"

    def _set_keys(self, ids: Items[int]) -> None:
        """A key for each full page of the prompt, each made of the one before and its own tokens."""
        key, self._keys = hashlib.sha256(self._identity.encode()), []
        for start in range(0, len(ids) - len(ids) % PAGE, PAGE):
            key.update(array("i", ids[start : start + PAGE]).tobytes())
            self._keys.append(key.hexdigest()[:40])

    def load(self, ids: Items[int]) -> int:
        """Puts the longest known beginning of the prompt `ids` into the engine's empty cache. Returns how many tokens that is: all but
        the last at most, whose logits are wanted."""
        self._set_keys(ids)
        if len(ids) < SHORTEST_KEPT or len(ids) > self._engine.n_ctx:
            return 0
        state = self._longest((len(ids) - 1) // PAGE)
        if state is None:
            return 0
        try:
            self._engine.adopt(ids[: state.length], state, self._fill)
        except (DamagedPageError, ContextFullError):
            return 0  # it is computed as if nothing had been there
        return state.length

    def _longest(self, pages: int) -> SequenceState | None:
        try:
            there = {entry.name for entry in os.scandir(self._folder)}
        except OSError:
            return None
        if any(self._name(0, f"side{number}") not in there for number in range(self._n_sides)):
            return None
        full = [group for group, window in enumerate(self._windows) if not window]
        known = next((page for page in range(pages) if any(self._name(page, group) not in there for group in full)), pages)
        for n in range(known, 0, -1):
            firsts = [max(0, n * PAGE - window + 1) // PAGE if window else 0 for window in self._windows]
            if all(self._name(page, group) in there for group, first in enumerate(firsts) for page in range(first, n)):
                return SequenceState(n * PAGE, tuple(tuple(range(first * PAGE, n * PAGE, PAGE)) for first in firsts))
        return None

    def _fill(self, missing: Items[tuple[int, int, int]]) -> None:
        for group, base, page in missing:
            buffer = self._pool.page(group, page)
            self._read(self._name(base // PAGE, group), buffer)
            self._pool.put_page(group, page, buffer)
        sides = self._pool.sides()
        for number, side in enumerate(sides):
            self._read(self._name(0, f"side{number}"), side)
        self._pool.put_sides(sides)

    def _read(self, name: str, into: np.ndarray) -> None:
        path = self._folder / name
        try:
            with open(path, "rb", buffering=0) as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little") & 0xFFFF))
                right = header["data"]["shape"] == [len(into)] and file.readinto(memoryview(into)) == len(into)
                right = right and digest(into) == header["__metadata__"]["sha256"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            right = False
        with contextlib.suppress(OSError):  # a cache that cannot be written can still be read
            if right:
                os.utime(path)  # used now
            else:
                path.unlink()
        if not right:
            raise DamagedPageError(f"{path}: damaged")

    def keep(self) -> None:
        """Called when the prompt has been read and its answer begins: copies what that answer may overwrite."""
        if len(self._keys) * PAGE < SHORTEST_KEPT:
            return
        self._copies = [(self._name(page, group), self._pool.page(group, number).copy())
                        for group, page, number in self._here() if self._windows[group] and not self._has(self._name(page, group))]
        for number, side in enumerate(self._pool.sides()):
            if not self._has(self._name(0, f"side{number}")):
                self._copies.append((self._name(0, f"side{number}"), side.copy()))

    def _here(self) -> list[tuple[int, int, int]]:
        """(group, page of the prompt, page of the pool) of each full page of the prompt that the cache holds."""
        return [(group, base // PAGE, number) for group, table in enumerate(self._engine.sequence.tables())
                for base, number in zip(table.base, table.pages, strict=True) if base // PAGE < len(self._keys)]

    def _has(self, name: str) -> bool:
        return (self._folder / name).exists()

    def save(self) -> None:
        """Called when the answer has ended: writes the pages of the prompt that are not there. A disk that is full or read-only is no
        failure: it is a cache."""
        if len(self._keys) * PAGE < SHORTEST_KEPT:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name, data in self._copies:
                self._write(name, data)
            for group, page, number in self._here():
                if not self._windows[group] and not self._has(self._name(page, group)):
                    self._write(self._name(page, group), self._pool.page(group, number))
            self.trim()
        self._copies = []

    def _write(self, name: str, data: np.ndarray) -> None:
        from safetensors.numpy import save

        partial = self._folder / f".{os.getpid()}-{name}"
        try:
            with open(os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
                file.write(save({"data": data}, {"sha256": digest(data)}))
            os.replace(partial, self._folder / name)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def trim(self) -> None:
        """Removes what was used longest ago until everything fits into the limit. What says that it was used in the future, by a clock that
        was wrong, goes first: it would stay for ever. OSError."""
        files, soon = [], time.time() + _CLOCKS
        for folder in os.scandir(self.root):
            for entry in os.scandir(folder.path):
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    files.append((stat.st_mtime if stat.st_mtime < soon else 0.0, stat.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                break
            Path(path).unlink(missing_ok=True)
            total -= size

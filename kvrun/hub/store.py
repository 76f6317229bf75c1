"""The local store: one folder per packaged file, under the user's cache directory (or KVRUN_CACHE)."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvrun.errors import StorageError
from kvrun.hub.catalog import Package
from kvrun.hub.files import Progress


def store_dir() -> Path:
    """Where packaged models lie. KVRUN_CACHE, when set, replaces the user's cache directory."""
    if place := os.environ.get("KVRUN_CACHE"):
        return Path(place).expanduser() / "models"
    import platformdirs

    return Path(platformdirs.user_cache_dir("kvrun", appauthor=False)) / "models"


def packed_dir() -> Path:
    """Where weights that were quantized here are kept."""
    return store_dir().parent / "packed"


def packed_path(source: Path, layout: bytes) -> Path:
    """Where the weights of the file or folder `source` are kept once they were quantized to `layout`."""
    return packed_dir() / f"{source.stem}-{_place(source)}-{hashlib.sha256(layout).hexdigest()[:16]}.packed"


def packed_files(source: Path) -> list[Path]:
    """All that is kept of `source`, in any layout, also where `source` itself has gone."""
    folder = packed_dir()
    return sorted(folder.glob(f"*-{_place(source)}-*")) if folder.is_dir() else []


def _place(source: Path) -> str:
    return hashlib.sha256(os.fsencode(os.path.abspath(source))).hexdigest()[:16]


def checked_dir() -> Path:
    """Where it is noted, in empty files, which tokenizers were found good."""
    return store_dir().parent / "checked"


def package_path(package: Package) -> Path:
    """Where this very file (its sha256 is part of the folder's name) lies once fetched."""
    return store_dir() / f"{Path(package.file).stem}-{package.sha256[:8]}" / package.file


def storage_error(e: OSError, path: Path | str) -> StorageError:
    """What an OSError while writing below `path` means to the user."""
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{path}: no space left on the disk; free some, or put the store elsewhere")
    return StorageError(f"{e.filename or path}: {e.strerror or e}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Maps OSErrors of the block to StorageError."""
    try:
        yield
    except OSError as e:
        raise storage_error(e, path) from e


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock file, so that two pulls at once take turns; made if absent. StorageError if it cannot be."""
    from huggingface_hub.utils import WeakFileLock

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = WeakFileLock(folder / ".lock")
        lock.__enter__()
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` last, where the system can."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError:
        pass  # some network file systems cannot
    finally:
        os.close(fd)


@contextmanager
def watching(measure: Callable[[], int], what: str, total: int | None, progress: Progress | None) -> Iterator[None]:
    """Calls `progress` with measure() a few times a second while the block runs: for downloads that another program,
    or another library's threads, make."""
    if progress is None:
        yield
        return
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(0.15):
            try:
                progress(what, measure(), total)
            except OSError:
                continue  # a file vanished between listing and measuring

    thread = threading.Thread(target=run, daemon=True)
    progress(what, 0, total)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()

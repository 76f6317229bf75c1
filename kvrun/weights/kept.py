"""Packed matrices kept on disk beside the model store, so that a model is quantized once and not at every start.

A file holds a header and then the arena as it lies in memory. The header names what the bytes were made from: format version,
layout, and size, times and samples of the weight files; a file that does not match, or is not whole, is packed anew. It is read,
not mapped: decoding is as fast from either, but a mapped file that somebody cuts short ends the process with SIGBUS.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from kvrun.backends.memory import Arena
from kvrun.backends.native import lib
from kvrun.errors import KvrunError
from kvrun.hub.store import packed_path
from kvrun.models.spec import TensorRef
from kvrun.weights.blob import open_file, read_bytes, read_into, samples
from kvrun.weights.load import PackedWeight, requantizes
from kvrun.weights.source import TensorSource

_VERSION = 2
_HEADER = struct.Struct("<8s32s32sQ")  # magic, what it was made from, samples of the data, bytes of data
_MAGIC = b"KVRUNPK\0"
_START = 4096                          # of the data
_PIECE = 8 << 20


class KeptWeights:
    """The file of one model in one layout."""

    def __init__(self, path: Path, key: bytes) -> None:
        """key: 32 bytes that name what the file must have been made from."""
        self.path, self._key = path, key

    @classmethod
    def of(cls, packed: list[PackedWeight], source: TensorSource, refs: Mapping[str, TensorRef]) -> KeptWeights | None:
        """None where packing only moves bytes, which is as fast as reading them back."""
        if not any(requantizes(item, source, refs) for item in packed):
            return None
        layout = repr([(p.weight, p.dtype, p.offset, p.n_bytes) for p in packed]).encode()
        key = hashlib.sha256(repr((_VERSION, lib.KV_ABI, source.fingerprint())).encode() + layout).digest()
        return cls(packed_path(source.path, layout), key)

    def read(self, arena: Arena, threads: int, progress: Callable[[int, int], None] | None = None) -> bool:
        """Fills the arena. False, with anything in it, where there is no file, or not the one wanted, or not all of it."""
        try:
            fd = open_file(self.path)
        except KvrunError:
            return False
        try:
            if os.fstat(fd).st_size != _START + arena.n_bytes:
                return False
            header = read_bytes(fd, _HEADER.size, 0, self.path, "")
            if _HEADER.unpack(header) != (_MAGIC, self._key, samples(fd, _START, arena.n_bytes, self.path), arena.n_bytes):
                return False
            return self._fill(fd, arena, threads, progress)
        except KvrunError:                 # it became shorter meanwhile, or the disk fails
            return False
        finally:
            os.close(fd)

    def _fill(self, fd: int, arena: Arena, threads: int, progress: Callable[[int, int], None] | None) -> bool:
        starts = iter(range(0, arena.n_bytes, _PIECE))
        lock, failed = threading.Lock(), []

        def work() -> None:
            try:
                while not failed:
                    with lock:
                        start = next(starts, None)
                        if start is None:
                            return
                        if progress:
                            progress(start, arena.n_bytes)
                    read_into(fd, arena.bytes[start : start + _PIECE], _START + start, self.path, "")
            except KvrunError as error:
                failed.append(error)

        workers = [threading.Thread(target=work, name="kvrun-read") for _ in range(threads - 1)]
        for worker in workers:
            worker.start()
        work()
        for worker in workers:
            worker.join()
        return not failed

    def _remove_left(self) -> None:
        """Removes what processes left that were killed while they wrote: as large as the model. OSError."""
        for entry in os.scandir(self.path.parent):
            if entry.name.startswith(self.path.name) and entry.name.endswith(".tmp"):
                with contextlib.suppress(FileNotFoundError):          # another process was faster
                    if not _still_written(entry.path):
                        os.unlink(entry.path)

    def _temporary(self) -> tuple[int, str]:
        """A new file beside, locked while it is written, and its name. OSError."""
        while True:
            fd, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name, suffix=".tmp")
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return fd, name
            os.close(fd)                                              # removed by another process before it was locked

    def write(self, arena: Arena) -> str | None:
        """Keeps the arena's bytes. Returns why that failed, as one line, with nothing left behind."""
        temporary = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._remove_left()
            fd, temporary = self._temporary()
            try:
                os.posix_fallocate(fd, 0, _START + arena.n_bytes)     # a full disk says so before anything is written
                for start in range(0, arena.n_bytes, _PIECE):
                    _write_all(fd, arena.bytes[start : start + _PIECE], _START + start)
                os.pwrite(fd, _HEADER.pack(_MAGIC, self._key, samples(fd, _START, arena.n_bytes, self.path), arena.n_bytes), 0)
                os.replace(temporary, self.path)
            finally:
                os.close(fd)
            return None
        except (OSError, KvrunError) as error:
            if temporary is not None:
                try:
                    os.unlink(temporary)
                except OSError:
                    pass
            reason = error.strerror if isinstance(error, OSError) else error
            return f"{self.path.parent}: the packed weights cannot be kept there ({reason}); they are quantized again at every start"


def _still_written(path: str) -> bool:
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _write_all(fd: int, data, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done

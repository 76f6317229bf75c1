"""Reading a file by position: every byte that was asked for, or a ModelError."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kvrun.errors import ModelError, NotFoundError, StorageError

_LFS = b"version https://git-lfs"
_CHUNK = 1 << 30  # the kernel moves at most 2 GiB a call


def open_file(path: Path) -> int:
    """A descriptor for reading. NotFoundError if there is no such file, StorageError if it cannot be opened."""
    try:
        # without O_NONBLOCK a named pipe would wait here for a writer
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file") from None
    except OSError as e:
        raise StorageError(f"{path}: cannot be opened: {e.strerror}") from e
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise StorageError(f"{path}: not a regular file")
    return fd


def read_into(fd: int, buffer, offset: int, path: Path, repair: str) -> None:
    """Fills `buffer` (writable, contiguous) from byte `offset`. ModelError when the file ends before it is full."""
    view = memoryview(buffer).cast("B")
    at = 0
    while at < len(view):
        try:
            got = os.preadv(fd, [view[at:at + _CHUNK]], offset + at)
        except OSError as e:
            raise StorageError(f"{path}: reading at byte {offset + at} failed: {e.strerror}") from e
        if got == 0:
            raise ModelError(f"{path}: cut short at byte {offset + at}, {len(view) - at} more were expected; {repair}")
        at += got


def read_bytes(fd: int, size: int, offset: int, path: Path, repair: str) -> bytearray:
    """`size` bytes from `offset`."""
    out = bytearray(size)
    read_into(fd, out, offset, path, repair)
    return out


def samples(fd: int, start: int, size: int, path: Path) -> bytes:
    """sha256 over 64 pieces of 4 KiB, spread over `size` bytes from `start` on, the first and the last among them."""
    import hashlib

    digest, piece = hashlib.sha256(), min(4096, size)
    for i in range(64):
        digest.update(read_bytes(fd, piece, start + (size - piece) * i // 63, path, ""))
    return digest.digest()


def fingerprint(fd: int, path: Path) -> tuple:
    """What tells a file's content from another's without reading all of it: size, time of change, samples."""
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns, samples(fd, 0, status.st_size, path).hex()


def refuse_lfs_pointer(head: bytes, path: Path, repair: str) -> None:
    """ModelError when `head`, the first bytes of a file, are those of a git-LFS pointer instead of the file itself."""
    if bytes(head).startswith(_LFS):
        raise ModelError(f"{path}: a git-LFS pointer, not the file itself; {repair} (or git lfs pull)")

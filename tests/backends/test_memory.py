"""Arenas: all of their memory is there when they are, whatever their size."""

import ctypes
import mmap

import pytest

from kvrun.backends import memory
from kvrun.backends.memory import Arena
from kvrun.errors import OutOfMemoryError


def resident(arena: Arena) -> int:
    """Pages of the arena that are in memory, of all."""
    pages = -(-arena.n_bytes // mmap.PAGESIZE)
    vector = (ctypes.c_ubyte * pages)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(arena.address), ctypes.c_size_t(arena.n_bytes), vector) == 0
    return sum(byte & 1 for byte in vector)


@pytest.mark.parametrize("n_bytes", [64, 4096, 8 << 20, (8 << 20) + 64, (40 << 20) - 64, 77 << 20])
@pytest.mark.parametrize("threads", [0, 1, 4], ids=lambda n: f"{n} threads are allowed")
def test_all_of_it_is_resident_and_zero(n_bytes, threads, monkeypatch):
    started = []

    def start(thread, start=memory.Thread.start):
        if len(started) == threads:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(memory.Thread, "start", start)
    monkeypatch.setattr(memory.os, "cpu_count", lambda: 4)
    arena = Arena(n_bytes, "a test")
    assert resident(arena) == -(-n_bytes // mmap.PAGESIZE) and not arena.bytes.any()
    assert len(started) == min(threads, 3, (n_bytes - 1) // memory._SLICE)
    arena.close()


def test_too_much_is_an_error_that_says_what_for():
    with pytest.raises(OutOfMemoryError, match="no memory for a test"):
        Arena(1 << 60, "a test")


def test_an_older_kernel_has_its_pages_touched(monkeypatch):
    monkeypatch.setattr(memory, "_POPULATE_WRITE", 999)
    assert resident(Arena(20 << 20, "a test")) == (20 << 20) // mmap.PAGESIZE

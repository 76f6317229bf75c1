"""Arenas: page-aligned memory taken from the system once, in full, and given back at close."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from contextlib import suppress
from threading import Thread

import numpy as np

from kvrun.errors import OutOfMemoryError

ALIGN = 64
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14; Python has no name for it
_SLICE = 8 << 20      # bytes a call: between two, other threads of the process can map memory
_THREADS = 4          # more wait for each other
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def aligned(n_bytes: int) -> int:
    """n_bytes rounded up to a cache line."""
    return -(-n_bytes // ALIGN) * ALIGN


class Arena:
    """n_bytes of zeroed, resident memory, in huge pages where the system grants them.

    Raises OutOfMemoryError naming `purpose` when the system refuses.
    """

    def __init__(self, n_bytes: int, purpose: str) -> None:
        self.n_bytes = n_bytes
        try:
            # Python's default is shared memory, which gets no transparent huge pages: reads would run at 2/3 the speed.
            self._map = mmap.mmap(-1, max(n_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            raise OutOfMemoryError(f"no memory for {purpose} ({n_bytes / 2**20:.0f} MiB): {error}") from None
        self.bytes = np.frombuffer(self._map, dtype=np.uint8)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                pass  # a kernel without transparent huge pages
        self._make_resident(purpose)

    def _make_resident(self, purpose: str) -> None:
        """Takes the memory now, so that running out is an error at start and never in the middle of an answer.

        By several threads, which leave the interpreter to others: a page that a virtual machine has to get from its host costs twenty times
        what clearing it costs, and Python's own madvise would stop every thread meanwhile.
        """
        size, refused = len(self._map), []
        slices = iter(range(0, size, _SLICE))

        def populate() -> None:
            for start in slices:
                if _LIBC.madvise(self.address + start, min(_SLICE, size - start), _POPULATE_WRITE):
                    refused.append(ctypes.get_errno())

        others = [Thread(target=populate) for _ in range(min(_THREADS, os.cpu_count() or 1, -(-size // _SLICE)) - 1)]
        with suppress(RuntimeError):  # no more threads are allowed: those that run do all
            for thread in others:
                thread.start()
        populate()
        for thread in others:
            if thread.ident is not None:
                thread.join()
        if errno.ENOMEM in refused:
            raise OutOfMemoryError(f"no memory for {purpose} ({self.n_bytes / 2**20:.0f} MiB)")
        if refused:
            self.bytes[:: mmap.PAGESIZE] = 0  # an older kernel: touch every page

    @property
    def address(self) -> int:
        """Where the arena starts."""
        return self.bytes.ctypes.data

    def close(self) -> None:
        """Gives the memory back once no view of it is left. Idempotent."""
        self.bytes = None
        self._map = None

"""Arenas: page-aligned memory taken from the system once, in full, and given back at close."""

from __future__ import annotations

import mmap

import numpy as np

from kvrun.errors import OutOfMemoryError

ALIGN = 64
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14; Python has no name for it


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
        """Takes the memory now, so that running out is an error at start and never in the middle of an answer."""
        try:
            self._map.madvise(_POPULATE_WRITE)
        except MemoryError as error:
            raise OutOfMemoryError(f"no memory for {purpose} ({self.n_bytes / 2**20:.0f} MiB): {error}") from None
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) == 12:
                raise OutOfMemoryError(f"no memory for {purpose} ({self.n_bytes / 2**20:.0f} MiB)") from None
            self.bytes[:: mmap.PAGESIZE] = 0  # an older kernel: touch every page

    @property
    def address(self) -> int:
        """Where the arena starts."""
        return self.bytes.ctypes.data

    def close(self) -> None:
        """Gives the memory back once no view of it is left. Idempotent."""
        self.bytes = None
        self._map = None

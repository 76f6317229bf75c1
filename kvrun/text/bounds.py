"""The memory that encoding a text may take, asked for before the tokenizers library is: when that finds none, it ends the whole process,
with no exception to catch."""

from __future__ import annotations

import mmap

from kvrun.errors import OutOfMemoryError

_ENCODING_BYTES = 300   # that the library takes at most for each byte of a text: measured 280, with a token for each byte
_LONG = 1 << 20         # bytes of a text for which the system is asked what there is


def reserve(text: str) -> None:
    """OutOfMemoryError, with everything as it was, where encoding `text` may take more memory than there is."""
    need = _ENCODING_BYTES * len(text.encode("utf-8", "surrogatepass"))
    try:
        if need > _ENCODING_BYTES * _LONG:
            from kvrun.cache.planner import available_memory, resident_memory

            available = available_memory()
            if available is not None and need > available - resident_memory():
                raise MemoryError
        mmap.mmap(-1, need + mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()  # asked for, not touched
    except (OSError, MemoryError):
        raise OutOfMemoryError(f"a text of {len(text)} characters may take {need / 2**20:.0f} MiB of memory to encode, more than there is; "
                               "shorten it") from None

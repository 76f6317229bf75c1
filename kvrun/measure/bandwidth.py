"""How fast this machine reads memory: the ceiling of decoding."""

from __future__ import annotations

from kvrun.cache.planner import available_memory

_BYTES = 256 << 20  # far beyond any cache


def read_bandwidth(threads: int, repeat: int = 5) -> float:
    """Bytes per second that `threads` cores read together, best of `repeat`; takes a quarter of a GiB for a moment.
    Raises NativeMissingError without native kernels, OutOfMemoryError."""
    from kvrun.backends.memory import Arena
    from kvrun.backends.native import ffi, lib

    free = available_memory()
    n_bytes = _BYTES if free is None else max(1 << 20, min(_BYTES, free // 4 >> 20 << 20))
    arena = Arena(n_bytes, "measuring memory")
    speed = lib.kv_cpu_read_bandwidth(ffi.cast("void *", arena.address), n_bytes, threads, repeat)
    arena.close()
    return speed

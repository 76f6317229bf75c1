"""Limits on a process that works on files from the internet: what it may take, and what it may do."""

import os
import signal


def limit_memory(memory: int) -> None:
    """From now on this process may take `memory` bytes more than it has, and can neither write files nor start processes."""
    try:
        import resource
    except ImportError:
        return                  # no such limits on Windows; the deadline of whoever started this holds there too
    try:
        with open("/proc/self/statm") as f:
            memory += int(f.read().split()[0]) * resource.getpagesize()
    except OSError:
        memory += 64 << 20
    for name, value in (("RLIMIT_AS", memory), ("RLIMIT_DATA", memory), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0),
                        ("RLIMIT_NPROC", 0)):
        limit = getattr(resource, name, None)
        if limit is not None:
            try:
                hard = resource.getrlimit(limit)[1]
                value = value if hard == resource.RLIM_INFINITY else min(value, hard)
                resource.setrlimit(limit, (value, value))
            except (ValueError, OSError):
                pass            # macOS refuses RLIMIT_AS


def alarm(seconds: float) -> None:
    """Ends this process after so many seconds of computing; 0 calls that off. Computing, not waiting: a busy machine
    must not make a good file look bad, and what it is used for cannot wait."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def environment() -> dict[str, str]:
    """What such a process is given of the environment: TZ is for strftime_now, the rest lets the interpreter start."""
    keep = ("TZ", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
    return {name: os.environ[name] for name in keep if name in os.environ}

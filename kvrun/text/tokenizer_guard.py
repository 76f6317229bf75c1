"""Whether a tokenizer.json does what tokenizers do, found out in a process with limits (tokenizer_probe.py), once for each file."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from kvrun.hub.store import checked_dir
from kvrun.text.limits import environment
from kvrun.text.tokenizer import MAX_ADDED, MAX_TOKENS

_VERSION = 1
_MEMORY = (128 << 20, 24)       # bytes, and bytes for each one of the file: reading takes 11.5, measured
_SECONDS = (5.0, 0.5e-6)        # of computing to read the file, and for each byte; Gemma 3's 33 MB take 1.4
_ENCODE_SECONDS = 2.0           # of computing for the probe's texts; real tokenizers take 0.05
_PATIENCE = 60.0                # of waiting, on a machine that is busy


def why_not(data: bytes) -> str | None:
    """Why the tokenizers library should not be given the tokenizer.json `data`; None where it may. What was found good is remembered, by
    its sha256, in the user's cache directory."""
    import tokenizers

    digest = hashlib.sha256(f"{_VERSION} {tokenizers.__version__} ".encode())
    digest.update(data)
    seen = digest.hexdigest()
    marker = checked_dir() / seen
    if marker.exists():
        return None
    why = _try(data)
    if why is None:
        try:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
        except OSError:
            pass  # then it is tried again next time
    return why


def _try(data: bytes) -> str | None:
    memory, seconds = (int(base + each * len(data)) for base, each in (_MEMORY, _SECONDS))
    setup = {"path": [p for p in sys.path if p], "memory": memory, "seconds": seconds, "encode_seconds": _ENCODE_SECONDS,
             "tokens": MAX_TOKENS, "added": MAX_ADDED}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("tokenizer_probe.py")), json.dumps(setup)], input=data,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(), timeout=_PATIENCE + seconds,
            **({"process_group": 0} if os.name == "posix" else {}))  # Ctrl-C is for kvrun alone
    except subprocess.TimeoutExpired:
        return f"reading it takes more than {_PATIENCE + seconds:.0f} s"
    except OSError as error:
        return f"the process that tries it cannot be started: {error}"
    if done.returncode == -getattr(signal, "SIGPROF", 0):
        return f"reading it takes more than {seconds} s of computing, or a text of 4 KB more than {_ENCODE_SECONDS:g} s"
    try:
        return json.loads(done.stdout).get("error")
    except ValueError:
        return f"reading it takes more than {memory >> 20} MiB, or ends the process"

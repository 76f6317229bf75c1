"""Kills what writes files, at random moments, and looks at what is left. Run by hand with a large --kills; test_kills.py runs a few.

Each target is a process that writes as fast as it can: sessions, prompts and packed weights by the code that a chat and a run use, and
pulls by the command itself from a Hub on loopback. It gets SIGKILL or SIGTERM after a random time, in turn with the next process, which
goes on where that one ended. After each kill everything that a reader would trust is read: it must be the old or the new, whole, never a
mix; and nothing may pile up.

    python -m tests.faults.kills --kills 1000
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvrun.backends.memory import Arena
from kvrun.backends.plan import CacheGroup
from kvrun.cache.pool import Pool
from kvrun.cache.prompt_cache import PromptCache
from kvrun.cache.session import SessionStore, commit
from kvrun.cache.session_pages import PageArchive, digest
from kvrun.weights.kept import KeptWeights

from ..cache.documents import document

GROUPS = (CacheGroup(window=0, layers=(0, 2), kv_heads=1, head_dim=16), CacheGroup(window=200, layers=(1,), kv_heads=1, head_dim=16))


@dataclass
class Target:
    """What is killed. run(folder, seed): writes until it is ended. check(folder) -> how much of use it left; AssertionError.
    progress(folder): a number that grows when it has begun; None: when a file was changed last."""

    run: Callable[[Path, int], None]
    check: Callable[[Path], int]
    longest: float = 0.1
    """Seconds from then after which it is killed at the latest."""
    progress: Callable[[Path], int] | None = None


def page_is_whole(path: Path, named: bool = True) -> None:
    """A safetensors file of one array, whose checksum is its name, or is beside it."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    body = np.frombuffer(data[8 + size :], np.uint8)
    assert head["data"]["shape"] == [len(body)], f"{path} is cut"
    assert digest(body) == (path.stem if named else head["__metadata__"]["sha256"]), f"{path} is not what was written"


# ---- sessions ----


def save_sessions(folder: Path, seed: int) -> None:
    """Tokens come, pages fill, now and then some are taken back, and each time all is saved."""
    draw = np.random.default_rng(seed)
    pool = Pool(GROUPS, n_ctx=2048, chunk=128, kv=("q8", "q4"))
    sequence, session = pool.sequence(), SessionStore(folder).open("s")
    archive = PageArchive(session.pages, pool, sequence)
    for step in range(1 << 30):
        if sequence.length > 1500 or (sequence.length > 300 and draw.random() < 0.2):
            sequence.truncate(0)
            archive.rewound(0)
        sequence.extend(int(draw.integers(1, 129 - sequence.length % 128)))
        for group in range(len(GROUPS)):
            pool.page(group, sequence.tables()[group].pages[-1])[:] = draw.integers(0, 256, pool.groups[group].page_stride, dtype=np.uint8)
            pool.groups[group].side[:64] = draw.integers(0, 256, 64, dtype=np.uint8)
        archive.mark(step + 1, whole=True)
        assert archive.failed is None
        commit(session, archive, lambda step=step: document(saved=step, needed=sorted(archive.files())))


def check_sessions(folder: Path) -> int:
    session = SessionStore(folder).open("s")
    found = session.read()          # raises for what is no session
    needed = found.get("needed", [])
    for file in needed:
        page_is_whole(session.pages / file)
    partial = [p for p in session.folder.iterdir() if p.name.startswith(".")]
    session.close()
    assert not partial and len(list(folder.iterdir())) <= 1
    return len(needed)


# ---- prompts ----


class _Engine:
    """What PromptCache needs of an engine: a sequence that holds the prompt."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.sequence, self.n_ctx = pool, pool.sequence(), 2048


def save_prompts(folder: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    pool = Pool(GROUPS, n_ctx=2048, chunk=128, kv=("q8", "q8"))
    engine = _Engine(pool)
    while True:
        engine.sequence.truncate(0)
        ids = draw.integers(0, 1000, int(draw.integers(256, 1500))).tolist()
        cache = PromptCache("model", engine, root=folder, limit=1 << 20)
        cache._set_keys(ids)
        while engine.sequence.length < len(ids):
            engine.sequence.extend(min(128, len(ids) - engine.sequence.length))
        cache.keep()
        cache.save()


def check_prompts(folder: Path) -> int:
    pages = [p for p in (folder / "model").glob("*") if not p.name.startswith(".")] if folder.exists() else []
    for path in pages:
        page_is_whole(path, named=False)
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 3 << 20, "what was killed piles up"
    return len(pages)


# ---- packed weights ----

KEY = hashlib.sha256(b"what they were made from").digest()
SIZES = (1 << 20, 3 << 20)


def _arena(seed: int) -> Arena:
    arena = Arena(SIZES[seed % 2], "a test")
    arena.bytes[:] = np.random.default_rng(seed % 8).integers(0, 256, arena.n_bytes, dtype=np.uint8)
    return arena


def keep_weights(folder: Path, seed: int) -> None:
    for i in range(1 << 30):
        arena = _arena(seed + i)
        assert KeptWeights(folder / "m.packed", KEY).write(arena) is None
        arena.close()


def check_weights(folder: Path) -> int:
    path = folder / "m.packed"
    if not path.exists():
        return 0
    assert len(list(folder.iterdir())) < 4, "what was killed piles up"
    for seed in range(200):                     # another process may put others there between two readings
        arena = Arena(SIZES[seed % 2], "a test")
        whole = KeptWeights(path, KEY).read(arena, 1)
        data = arena.bytes.copy()
        arena.close()
        if whole:
            break
    assert whole, "the packed weights cannot be read"
    for seed in range(8):
        wanted = _arena(seed)
        same = len(data) == wanted.n_bytes and bool((data == wanted.bytes).all())
        wanted.close()
        if same:
            return 1
    raise AssertionError("the packed weights are none that were ever written")


# ---- pulls ----


def pulls(hub, repo: str, checksums: dict[str, str]) -> Target:
    """Of `repo`, again and again into a cache that is emptied of it when it is whole."""
    def run(folder: Path, seed: int) -> None:
        os.environ |= {"HF_HOME": str(folder), "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        os.environ.pop("HF_HUB_OFFLINE", None)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.execv(sys.executable, [sys.executable, "-m", "kvrun", "pull", repo, "-q"])

    def check(folder: Path) -> int:
        blobs = list((folder / "hub").glob("models--*/blobs/*"))
        whole = [p for p in blobs if "incomplete" not in p.name]
        for path in whole:
            data = path.read_bytes()
            digests = (hashlib.sha256(data).hexdigest(), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())
            assert path.name in digests, f"{path} is not what its name says"
        snapshots = {p.name: p for p in (folder / "hub").glob("models--*/snapshots/*/*") if p.exists()}
        for name, path in snapshots.items():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == checksums[name], f"{path} is not the Hub's"
        assert len(blobs) - len(whole) < 60, "what was killed piles up"
        if set(checksums) <= set(snapshots):
            subprocess.run(["rm", "-rf", str(folder / "hub")], check=True)
        return len(snapshots)

    return Target(run, check, longest=0.5, progress=lambda folder: len(hub.requests))


def _saved(folder: Path) -> int:
    """When the session was saved last, in ns."""
    path = folder / "s/session.json"
    return path.stat().st_mtime_ns if path.exists() else 0


LOCAL = {"session": Target(save_sessions, check_sessions, progress=_saved), "prompt": Target(save_prompts, check_prompts),
         "weights": Target(keep_weights, check_weights)}


def _newest(folder: Path) -> int:
    """When a file below `folder` was last changed, in ns; 0 where there is none."""
    newest = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                newest = max(newest, os.stat(os.path.join(where, name)).st_mtime_ns)
            except FileNotFoundError:
                continue
    return newest


def start(target: Target, folder: Path, seed: int) -> int:
    """A process that runs `target`, once it has begun: its start is not what is to be killed. Returns its id."""
    progress = target.progress or _newest
    since = progress(folder)
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            target.run(folder, seed)
        except BaseException:  # noqa: BLE001 - of the child alone
            import traceback

            traceback.print_exc()
        finally:
            os._exit(99)
    deadline = time.monotonic() + 300
    while progress(folder) <= since:
        assert time.monotonic() < deadline and os.waitpid(child, os.WNOHANG) == (0, 0), f"process {child} does nothing"
        time.sleep(0.002)
    return child


def kill(target: Target, folder: Path, kills: int, rng: random.Random) -> Counter:
    """Kills `target` so often. Returns what happened: {"SIGKILL": n, "SIGTERM": n, "ended": n, "left": n}."""
    happened: Counter = Counter()
    for _ in range(kills):
        child = start(target, folder, rng.getrandbits(32))
        signum = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        time.sleep(rng.uniform(0, target.longest))
        os.kill(child, signum)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (-signal.SIGKILL, -signal.SIGTERM, 143, 0), f"it failed by itself, with {code}"
        happened[signum.name if code else "ended"] += 1
        happened["left"] += bool(target.check(folder))
    return happened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=1000, help="in all, over every target")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    from ..hub.conftest import Hub
    from .test_kills import hub_target

    hub = Hub()
    targets = LOCAL | {"pull": hub_target(hub)}
    shares = {"session": 0.3, "prompt": 0.3, "weights": 0.25, "pull": 0.15}
    with tempfile.TemporaryDirectory() as root:
        for name, target in targets.items():
            folder = Path(root) / name
            folder.mkdir()
            started = time.monotonic()
            happened = kill(target, folder, round(shares[name] * options.kills), random.Random(f"{options.seed}-{name}"))
            print(f"{name:<8} {dict(happened)} in {time.monotonic() - started:.0f} s", flush=True)
    hub.close()


if __name__ == "__main__":
    main()

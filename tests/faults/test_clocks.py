"""Clocks that jump: files from the future and from the beginning of time."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

from kvrun.cache.prompt_cache import PromptCache
from kvrun.cache.session import SessionStore

from ..cli.conftest import KVRUN
from .kills import GROUPS, Pool, _Engine


def keep(root: Path, limit: int, first: int) -> set[str]:
    """Keeps a prompt of four pages. Returns the names of its files that are there then."""
    engine = _Engine(Pool(GROUPS, n_ctx=2048, chunk=128, kv=("q8", "q8")))
    ids = [first] * 512
    cache = PromptCache("model", engine, root=root, limit=limit)
    cache.load(ids[:1])
    cache._set_keys(ids)
    while engine.sequence.length < len(ids):
        engine.sequence.extend(128)
    cache.keep()
    cache.save()
    return {p.name for p in (root / "model").iterdir() if p.name[:40] in cache._keys}


def test_prompts_from_the_future_make_room_first(tmp_path):
    old = keep(tmp_path, 1 << 30, 1)
    size = sum(p.stat().st_size for p in (tmp_path / "model").iterdir())
    for name in old:
        os.utime(tmp_path / "model" / name, (time.time() + 1e8, time.time() + 1e8))
    new = keep(tmp_path, size + size // 2, 2)
    assert len(new) == len(old), "what was kept just now is there"
    assert sum(p.stat().st_size for p in (tmp_path / "model").iterdir()) <= size + size // 2


def test_a_session_from_the_future_or_from_1970_is_a_session(environment, state, scripted):
    def run(*args, input=b""):
        return subprocess.run([*KVRUN, *map(str, args)], input=input, capture_output=True, env=environment | state, timeout=60)

    for name in ("past", "future"):
        assert run("chat", scripted, "--session", name, input=b"x\n").returncode == 0
    root = Path(state["XDG_STATE_HOME"]) / "kvrun/sessions"
    for name, when in (("past", 0), ("future", time.time() + 1e9)):
        for path in (root / name).rglob("*"):
            os.utime(path, (when, when))
    assert [row["name"] for row in json.loads(run("session", "ls", "--json").stdout)] == ["future", "past"]
    assert run("session", "ls").returncode == 0
    for name in ("past", "future"):
        assert b"1 turn, " in run("chat", "--session", name, input=b"y\n").stderr
    assert {info.name for info in SessionStore(root)} == {"past", "future"}


def test_weights_whose_time_changed_are_quantized_anew(environment, random_folder, tmp_path):
    mine = environment | {"KVRUN_CACHE": str(tmp_path)}
    command = [*KVRUN, "run", str(random_folder), "x", "--weights", "q8", "--max-tokens", "8", "--temp", "0"]
    answers = []
    for when in (None, 0, time.time() + 1e9):
        if when is not None:
            os.utime(random_folder / "model.safetensors", (when, when))
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=mine, timeout=60)
        assert (result.returncode, result.stderr) == (0, b"")
        answers.append(result.stdout)
    assert answers == [answers[0]] * 3 and len(list((tmp_path / "packed").iterdir())) == 1

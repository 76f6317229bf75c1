"""Row 24: kill -9 and SIGTERM at random moments of whatever writes: the old or the new, never a mix. And two processes at the same files."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time

import pytest
import safetensors.numpy  # noqa: F401 - loaded once, not in every child

from ..cli.conftest import KVRUN
from ..hub.conftest import Hub, add
from .kills import LOCAL, Target, kill, pulls, start

NAMES = ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json")


def hub_target(hub: Hub) -> Target:
    """Pulls of a small repository in three shards."""
    repo = add(hub, "org/killed", shards=3)
    tree = repo.trees[repo.revisions["main"]]
    wanted = [n for n in tree if n in NAMES or n.startswith("model-")]
    return pulls(hub, "org/killed", {n: hashlib.sha256(tree[n]).hexdigest() for n in wanted})


@pytest.mark.parametrize(("name", "kills"), [("session", 60), ("prompt", 12), ("weights", 12)])
def test_row_24_killed_at_any_moment_it_is_the_old_or_the_new(name, kills, rng, tmp_path):
    happened = kill(LOCAL[name], tmp_path, kills, rng)
    assert happened["left"] > 0, happened


def test_row_24_a_pull_killed_at_any_moment_leaves_nothing_wrong(hub, rng, tmp_path):
    kill(hub_target(hub), tmp_path, 5, rng)


def test_row_24_two_processes_that_write_the_same_are_both_right(tmp_path, rng):
    """Prompts and packed weights have no lock: a file appears whole, whoever wrote it."""
    for name in ("prompt", "weights"):
        folder = tmp_path / name
        folder.mkdir()
        children = [start(LOCAL[name], folder, 4) for _ in range(2)]
        left = 0
        for _ in range(5):
            time.sleep(0.05)
            left += _checked(name, folder)
        for child in children:
            os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "it failed by itself"
        assert left + LOCAL[name].check(folder) > 0


def _checked(name: str, folder) -> int:
    try:
        return LOCAL[name].check(folder)
    except FileNotFoundError:
        return 0  # the other one has just removed what was used longest ago


def test_row_24_two_commands_that_quantize_and_keep_the_same_model(environment, random_folder, tmp_path):
    mine = environment | {"KVRUN_CACHE": str(tmp_path / "cache")}
    command = [*KVRUN, "run", str(random_folder), "once upon a time " * 30, "--weights", "q8", "--max-tokens", "8", "--temp", "0"]
    both = [subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=mine) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in both]
    again = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=mine, timeout=120)
    assert again.returncode == 0 and again.stderr == b""
    assert [(p.returncode, *r) for p, r in zip(both, results, strict=True)] == [(0, again.stdout, b"")] * 2
    assert len(list((tmp_path / "cache/packed").iterdir())) == 1


def test_row_24_two_chats_at_once_have_a_session_each(environment, state, scripted):
    both = [subprocess.Popen([*KVRUN, "chat", str(scripted)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env=environment | state) for _ in range(2)]
    results = [process.communicate(b"one\ntwo\n", timeout=120) for process in both]
    assert [(p.returncode, *r) for p, r in zip(both, results, strict=True)] == [(0, "Größe,\nWelt\n".encode() * 2, b"")] * 2
    listed = subprocess.run([*KVRUN, "session", "ls"], capture_output=True, env=environment | state, timeout=60).stdout
    assert [line.split()[5] for line in listed.splitlines()[1:]] == [b"2", b"2"]

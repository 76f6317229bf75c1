"""Row 24: a disk that is full or cannot be written, while pulling, saving a session, a prompt or weights. On a real file system."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest

from ..cli.conftest import KVRUN, LINES, last_document
from ..cli.terminal import Screen
from ..hub.conftest import add
from .disks import Disk

SMALL = 3000        # KiB


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "disk", SMALL)
    yield disk
    disk.close()


@pytest.fixture
def command(environment, disk):
    """command(*args, input=b"") -> CompletedProcess: with sessions, caches and the Hub's cache on the small disk"""
    places = {"XDG_STATE_HOME": f"{disk.folder}/state", "XDG_CACHE_HOME": f"{disk.folder}/cache", "KVRUN_CACHE": f"{disk.folder}/cache/kvrun",
              "HF_HOME": f"{disk.folder}/hf"}

    def run(*args, input=b"", **env):
        return subprocess.run([*disk.enter, *KVRUN, *map(str, args)], input=input, capture_output=True, timeout=120,
                              env=environment | places | env)
    return run


def files(folder) -> dict[str, bytes]:
    """Every file below a folder but temporary ones and locks."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in (".lock", "lock")}


def one_error(result, *words: str) -> None:
    assert result.returncode == 9, (result.returncode, result.stderr)
    line = result.stderr.decode()
    assert line.count("kvrun: error:") == 1 and "Traceback" not in line
    for word in words:
        assert word in line, line


def test_row_24_a_full_disk_while_pulling(hub, command, disk, machine):
    add(hub, "org/first")
    add(hub, "org/second", shards=2)
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    assert command("pull", "org/first", "-q", **online).returncode == 0
    before = files(disk.inside / "hf")
    disk.fill(leave_kib=100)
    one_error(command("pull", "org/second", "-q", **online), "no space left on the disk", str(disk.folder / "hf"))
    after = files(disk.inside / "hf")
    assert {name: after[name] for name in before} == before, "what was there is whole"
    assert command("verify", "org/first", "-q").returncode == 0
    assert command("run", "org/second", "x").returncode == 3
    disk.empty()
    assert command("pull", "org/second", "-q", **online).returncode == 0
    assert command("verify", "org/second", "-q").returncode == 0


def test_row_24_a_full_disk_while_saving_a_session(command, disk, random_folder, environment):
    state = {"XDG_STATE_HOME": str(disk.inside / "state")}
    args = ("chat", random_folder, "--session", "s", "--max-tokens", "3", "-n", "2048")
    assert command(*args, input=b"one\n").returncode == 0
    before = last_document(state)
    disk.fill()
    full = command(*args, input=b"two\nthree\n")
    assert full.returncode == 9 and full.stdout.count(b"\n") >= 2, full
    assert full.stderr.count(b"cannot be saved") == 1 and b"No space left" in full.stderr
    assert last_document(state) == before, "the old session is there, whole"
    disk.empty()
    again = command(*args, input=b"four\n")
    assert again.returncode == 0 and b"1 turn, " in again.stderr and b"read again" not in again.stderr
    assert [turn["user"] for turn in last_document(state)["turns"]] == ["one", "four"]


def test_row_24_a_disk_that_has_room_for_the_text_alone(environment, state, random_folder):
    """A limit on the size of files stands for the disk: pages do not fit, the conversation does."""
    def talk(message, limit="exec", *args):
        line = f"{limit} " + " ".join([*KVRUN, "chat", *map(str, args), "--max-tokens", "3"])
        return subprocess.run(["bash", "-c", line], input=message, capture_output=True, env=environment | state, timeout=60)

    assert talk(b"one\n", "exec", random_folder, "--session", "s").returncode == 0
    full = talk(b"two\nthree\n", "ulimit -f 40; exec", "-c")
    assert full.returncode == 9 and full.stderr.count(b"cannot be saved") == 1 and b"File too large" in full.stderr
    assert [turn["user"] for turn in last_document(state)["turns"]] == ["one", "two", "three"]
    again = talk(b"four\n", "exec", "-c")
    assert again.returncode == 0 and b"read again" in again.stderr


def test_row_24_a_full_disk_is_nothing_to_the_prompt_cache(command, disk, random_folder):
    """It is a cache: the answer comes, and what was kept before is still read."""
    args = ("run", random_folder, "--json", "--max-tokens", "4", "--seed", "1")
    first = json.loads(command(*args, "once upon a time " * 40).stdout)
    before = files(disk.inside / "cache")
    assert before
    disk.fill()
    other = command(*args, "another beginning " * 40)
    assert other.returncode == 0 and other.stderr == b"" and json.loads(other.stdout)["usage"]["cached_tokens"] == 0
    assert files(disk.inside / "cache") == before
    again = json.loads(command(*args, "once upon a time " * 40).stdout)
    assert again["usage"]["cached_tokens"] > 256 and again["tokens"] == first["tokens"]


def test_row_24_a_full_disk_while_keeping_quantized_weights(command, disk, random_folder):
    """Said in a line; the answer comes, and nothing half written stays."""
    args = ("run", random_folder, "x", "--weights", "q8", "--max-tokens", "4", "--seed", "1")
    disk.fill(leave_kib=60)
    full = command(*args)
    assert full.returncode == 0 and full.stderr.count(b"\n") == 1
    assert b"the packed weights cannot be kept there (No space left on device)" in full.stderr
    packed = disk.inside / "cache/kvrun/packed"
    assert list(packed.iterdir()) == []
    disk.empty()
    assert command(*args).stderr == b"" and len(list(packed.iterdir())) == 1
    assert command(*args).stdout == full.stdout


def test_row_24_a_disk_that_cannot_be_written(command, disk, random_folder, hub):
    """Each command says so, or does without; nothing of it is a failure of the answer."""
    prompt = "once upon a time " * 40
    warm = ("run", random_folder, prompt, "--json", "--max-tokens", "4", "--weights", "q8")
    first = json.loads(command(*warm).stdout)
    assert command("chat", random_folder, "--session", "s", "--max-tokens", "3", input=b"one\n").returncode == 0
    before = files(disk.inside)
    disk.remount("ro")
    read = command(*warm)
    assert read.returncode == 0 and read.stderr == b"", read.stderr
    said = json.loads(read.stdout)
    assert said["usage"]["cached_tokens"] > 256 and said["tokens"] == first["tokens"]
    other = command("run", random_folder, "x", "--weights", "q4", "--max-tokens", "4")
    assert other.returncode == 0 and b"cannot be kept there (Read-only file system)" in other.stderr and other.stderr.count(b"\n") == 1
    new = command("chat", random_folder, "--max-tokens", "3", input=b"one\n")
    assert new.returncode == 0 and b"this chat will not be saved" in new.stderr and new.stdout
    one_error(command("chat", "-c", "--max-tokens", "3", input=b"two\n"), "Read-only file system")
    assert command("session", "ls").returncode == 0
    one_error(command("session", "rm", "s"), "Read-only file system")
    add(hub)
    one_error(command("pull", "org/tiny", "-q", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0"), "Read-only file system")
    assert files(disk.inside) == before


def test_row_24_killed_in_an_answer_the_turns_before_it_are_there(environment, state, endless):
    screen = Screen([*KVRUN, "chat", str(endless), "-n", "100000", "--max-tokens", "5"], environment | state)
    screen.wait_prompt()
    screen.ask("go", "line 104")
    screen.ask("/set max-tokens none", "max-tokens      none")
    screen.send("on\r")
    screen.wait_for("line 130")
    os.kill(screen.process.pid, signal.SIGKILL)
    screen.end()
    result = subprocess.run([*KVRUN, "chat", "-c", "--max-tokens", "2"], input=b"again\n", capture_output=True, env=environment | state, timeout=60)
    assert result.returncode == 0 and b"1 turn," in result.stderr and result.stdout == b"".join(LINES[:2])
    assert [turn["user"] for turn in last_document(state)["turns"]] == ["go", "again"]

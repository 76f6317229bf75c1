"""What the faults are done to: tiny models, the command in a process of its own, a Hub on loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ..cli.conftest import (KVRUN, chat, endless, environment, home, hostile, kvrun, random_folder, scripted,  # noqa: F401
                            state, terminal, without_template)
from ..hub.conftest import Hub, Machine, Repo, hub, machine, tiny_gguf  # noqa: F401


def check(result: subprocess.CompletedProcess, code: int, *words: str) -> str:
    """One line on stderr that says `words`, nothing on stdout, this exit code. Returns the line."""
    line = result.stderr if isinstance(result.stderr, str) else result.stderr.decode()
    assert result.returncode == code, (result.returncode, line)
    assert not result.stdout
    assert line.startswith("kvrun: error: ") and line.count("\n") == 1 and line.endswith("\n"), line
    assert "Traceback" not in line
    for word in words:
        assert word in line, line
    return line


@pytest.fixture
def copy(tmp_path, scripted):
    """copy(name="m") -> a new copy of the model that answers two lines"""
    def make(name: str = "m") -> Path:
        return Path(shutil.copytree(scripted, tmp_path / name))
    return make


@pytest.fixture
def online(machine):
    """online(*args, **env) -> CompletedProcess with text: the command on a machine that has the Hub on loopback."""
    def run(*args: object, **env: str) -> subprocess.CompletedProcess:
        process = start(machine, *args, **env)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)
    return run


def start(machine: Machine, *args: object, **env: str) -> subprocess.Popen:
    """The command on such a machine, started."""
    mine = {k: v for k, v in machine.env.items() if k != "PYTHONPATH"} | ({"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {})
    return subprocess.Popen([*KVRUN, *map(str, args)], env=mine | env, cwd=machine.home, text=True, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def publish(hub: Hub, folder: Path, name: str = "org/model", **extra) -> Repo:  # noqa: F811
    """Puts the files of a model on the Hub."""
    repo = hub.repos[name] = Repo(**extra)
    repo.commit({path.name: path.read_bytes() for path in folder.iterdir()}, "main")
    return repo

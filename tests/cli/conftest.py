"""The command as users have it: a process of its own, with a home of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from ..engine.tiny_model import random_model, scripted_model
from .terminal import Screen

KVRUN = [sys.executable, "-m", "kvrun"]
LINES = [b"line %d\n" % i for i in range(100, 200)]
HOSTILE = [b"safe ", b"\x1b", b"]52;c;cm0=\x07", b"\x1b[2", b"J", b"\xc2\x9b31mred", b"\xe2\x80", b"\xaetxt", b" [bold]markup[/bold]",
           b"\x1b]0;title\x07", b" \xe4\xb8\x96", b" end"]


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Nothing of the user who runs the tests is read or written."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def environment(home):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "HF_", "KVRUN_", "LC_")) and k not in ("NO_COLOR", "LANG")}
    return kept | {"HOME": str(home), "TERM": "xterm-256color", "HF_HUB_OFFLINE": "1", "LANG": "C.UTF-8"}


@pytest.fixture
def kvrun(environment):
    """kvrun(*args, input=b"...", env={}, memory=None) -> CompletedProcess with bytes. Without input, standard input is empty. memory: the
    most bytes of address space."""
    def run(*args, input: bytes = b"", env: dict | None = None, memory: int | None = None) -> subprocess.CompletedProcess:
        limit = ["bash", "-c", f'ulimit -v {memory >> 10}; exec "$@"', "-"] if memory else []
        return subprocess.run([*limit, *KVRUN, *map(str, args)], input=input, capture_output=True, env=environment | (env or {}),
                              timeout=120)
    return run


@pytest.fixture(scope="session")
def scripted(tmp_path_factory):
    """Answers two lines and stops. The text is cut inside a character."""
    return scripted_model(tmp_path_factory.mktemp("scripted"), [b"Gr\xc3", b"\xb6\xc3", b"\x9fe,\n", b"Welt"])


@pytest.fixture(scope="session")
def endless(tmp_path_factory):
    """Counts lines for ever."""
    return scripted_model(tmp_path_factory.mktemp("endless"), LINES, loop=True)


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    """Answers with what a terminal would execute."""
    return scripted_model(tmp_path_factory.mktemp("hostile"), HOSTILE)


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory):
    """Random weights with a chat template."""
    return random_model(tmp_path_factory.mktemp("random"), 4)


@pytest.fixture(scope="session")
def without_template(tmp_path_factory):
    """Random weights without a chat template."""
    return random_model(tmp_path_factory.mktemp("base"), 5, template=None)


@pytest.fixture
def terminal(environment):
    """terminal(*args, env={}) -> Screen"""
    opened = []

    def open_(*args, env=None, **size) -> Screen:
        opened.append(Screen([*KVRUN, *map(str, args)], environment | (env or {}), **size))
        return opened[-1]

    yield open_
    for screen in opened:
        screen.process.close(force=True)


@pytest.fixture
def state(tmp_path):
    """A state folder of this test alone, as an environment."""
    return {"XDG_STATE_HOME": str(tmp_path / "state")}


@pytest.fixture
def chat(environment, state):
    """chat(folder, *args) -> Screen at its prompt"""
    opened = []

    def open_(folder, *args, env=None, **size) -> Screen:
        screen = Screen([*KVRUN, "chat", str(folder), *map(str, args)], environment | state | (env or {}), **({"columns": 110, "rows": 40} | size))
        opened.append(screen)
        screen.wait_prompt()
        return screen

    yield open_
    for screen in opened:
        screen.process.close(force=True)


def last_document(state) -> dict:
    """The document of the session that was saved last."""
    folder = max((p for p in os.scandir(state["XDG_STATE_HOME"] + "/kvrun/sessions")), key=lambda p: p.stat().st_mtime_ns)
    return json.loads(open(folder.path + "/session.json").read())["session"]


def dropped_on_stderr(err: bytes) -> int:
    """Tokens that the notices say were dropped from a full context."""
    return sum(int(n) for n in re.findall(rb"kvrun: context full: dropped (\d+) tokens, positions \d+-\d+", err))

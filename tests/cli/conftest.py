"""The command as users have it: a process of its own, with a home of its own."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

from ..engine.tiny_model import random_model, scripted_model

KVRUN = [sys.executable, "-m", "kvrun"]
LINES = [b"line %d\n" % i for i in range(100, 200)]
HOSTILE = [b"safe ", b"\x1b", b"]52;c;cm0=\x07", b"\x1b[2", b"J", b"\xc2\x9b31mred", b"\xe2\x80", b"\xaetxt", b" [bold]markup[/bold]",
           b"\x1b]0;title\x07", b" \xe4\xb8\x96", b" end"]


@pytest.fixture
def rng():
    """Random inputs; pytest shows the seed when the test fails."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


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
    """kvrun(*args, input=b"...", env={}) -> CompletedProcess with bytes. Without input, standard input is empty."""
    def run(*args, input: bytes = b"", env: dict | None = None) -> subprocess.CompletedProcess:
        return subprocess.run([*KVRUN, *map(str, args)], input=input, capture_output=True, env=environment | (env or {}),
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

"""The examples of every --help, run by a shell: those that need no network, with tiny models under the names that they use."""

import shutil
import subprocess
import sys

import pytest
import typer

from kvrun.cli.main import command_line

from ..engine.tiny_model import random_model, scripted_model

COMMAND = typer.main.get_command(command_line())
LEAVES = {name: command for name, command in COMMAND.commands.items() if not hasattr(command, "commands")}
LEAVES |= {f"{group} {name}": command for group, members in COMMAND.commands.items() for name, command in getattr(members, "commands", {}).items()}
NETWORK = ("pull", "rm")  # tests/hub has those, with a Hub of its own


@pytest.fixture(scope="module")
def made(tmp_path_factory, environment):
    """A folder with what the examples speak of, and the environment in which kvrun finds tiny models and a session named thesis."""
    tmp_path = tmp_path_factory.mktemp("examples")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/kvrun"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} -m kvrun \"$@\"\n")
    script.chmod(0o755)
    chat = scripted_model(tmp_path / "chat", [b"Sure:\n", b"```", b"python\n", b"def f(s):\n", b"    return s\n", b"```\n"])
    base = random_model(tmp_path / "base", 3)
    (tmp_path / "config/kvrun").mkdir(parents=True)
    (tmp_path / "config/kvrun/models.toml").write_text(f"[models.smollm2-135m]\npath = '{chat}'\n\n[models.gemma3-270m]\npath = '{base}'\n")
    work = tmp_path / "work"
    (work / "notes").mkdir(parents=True)
    for name in ("notes.txt", "book.txt", "notes/a.md"):
        (work / name).write_text("It was the best of times, it was the worst of times. " * 50)
    (work / "reviews.tsv").write_text("1\tThe food was cold.\n2\tWe will come back!\n")
    (work / "person.json").write_text('{"type": "object", "properties": {"name": {"enum": ["Ann"]}}, "required": ["name"], "additionalProperties": false}')
    shutil.copytree(base, work / "my-model")
    subprocess.run(["git", "init", "-q"], cwd=work, check=True)
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "--allow-empty", "-m", "first"], cwd=work, check=True)
    variables = environment | {"PATH": f"{tmp_path}/bin:{environment['PATH']}", "XDG_CONFIG_HOME": str(tmp_path / "config"),
                               "XDG_STATE_HOME": str(tmp_path / "state"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for name in ("thesis", "2026-11-22-101500", "2026-11-22-111500", "old-1", "old-2"):
        subprocess.run([script, "chat", "smollm2-135m", "--session", name], input=b"hi\n", env=variables, check=True, capture_output=True)
    return work, variables


@pytest.fixture
def place(made, tmp_path):
    """As `made`, with sessions of this test alone."""
    work, variables = made
    shutil.copytree(variables["XDG_STATE_HOME"], tmp_path / "state")
    return work, variables | {"XDG_STATE_HOME": str(tmp_path / "state")}


def examples(text: str) -> list[str]:
    return [line.strip() for line in text.split("Examples:")[1].split("Exit codes")[0].splitlines() if "kvrun" in line]


@pytest.mark.parametrize("name", ["", "session", *(name for name in LEAVES if name not in NETWORK)])
def test_every_example_runs(place, name):
    if name in ("", "run"):
        pytest.importorskip("llguidance")
    work, variables = place
    text = COMMAND.help if not name else (LEAVES.get(name) or COMMAND.commands[name]).help
    for line in examples(text):
        if "./model.gguf" in line:
            continue  # tiny models are folders
        if shutil.which("jq") is None:
            line = line.split("| jq")[0]
        if line.startswith("kvrun chat"):
            line += " </dev/null" if "-c" in line.split() else " <<< hi"
        result = subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=work, env=variables, capture_output=True, timeout=120)
        # a chat that nobody talks to says so
        assert result.returncode == (2 if "</dev/null" in line else 0), f"{line}\n{result.stderr.decode()}"
        assert b"Traceback" not in result.stderr and b"\x1b" not in result.stdout

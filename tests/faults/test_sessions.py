"""Row 28: a session that is corrupt, of another model or of another format."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ..cli.conftest import KVRUN, last_document

SAID = "Größe,\nWelt\n".encode()


@pytest.fixture
def talk(environment, state):
    """talk(*args, input=b"x\\n") -> CompletedProcess of a chat"""
    def run(*args, input=b"x\n"):
        return subprocess.run([*KVRUN, "chat", *map(str, args)], input=input, capture_output=True, env=environment | state, timeout=60)
    return run


def folder_of(state) -> Path:
    return Path(state["XDG_STATE_HOME"]) / "kvrun/sessions/s"


HARM = {
    "cut": lambda data: data[:100],
    "empty": lambda data: b"",
    "one bit": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    "of a later kvrun": lambda data: data.replace(b'"format":1', b'"format":2'),
    "no text": lambda data: b"\xff\xfe" * 50,
    "deep": lambda data: b'{"session":' + b"[" * 100_000,
}


@pytest.mark.parametrize("harm", HARM)
def test_row_28_a_corrupt_session_is_put_aside_and_said(talk, state, scripted, harm):
    assert talk(scripted, "--session", "s").returncode == 0
    path = folder_of(state) / "session.json"
    broken = HARM[harm](path.read_bytes())
    path.write_bytes(broken)
    result = talk(scripted, "--session", "s")
    assert (result.returncode, result.stdout) == (0, SAID) and result.stderr.count(b"\n") == 1
    aside = Path(result.stderr.decode().partition("put aside as ")[2].partition(",")[0])
    assert (aside / "session.json").read_bytes() == broken and list((aside / "pages").iterdir()), "nothing of it is lost"
    assert talk("--session", "s").stdout == SAID and len(last_document(state)["turns"]) == 2


@pytest.mark.parametrize("harm", ["gone", "cut", "one bit"])
def test_row_28_a_damaged_page_is_said_and_the_conversation_is_read_again(talk, state, scripted, harm):
    talk(scripted, "--session", "s")
    (page,) = (folder_of(state) / "pages").iterdir()
    data = page.read_bytes()
    page.unlink()
    if harm != "gone":
        page.write_bytes(data[:-100] if harm == "cut" else data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    result = talk("--session", "s")
    assert (result.returncode, result.stdout) == (0, SAID), result.stderr
    assert b"its conversation is read again with the next message" in result.stderr and page.name.encode() in result.stderr
    again = talk("--session", "s")
    assert again.returncode == 0 and b"read again" not in again.stderr and len(last_document(state)["turns"]) == 3


def test_row_28_a_session_of_another_format_or_model(talk, state, scripted, endless):
    talk(scripted, "--session", "s")
    other = talk("--session", "s", "--kv", "q8")
    assert (other.returncode, other.stdout) == (0, SAID) and b"another cache format (f16): its conversation is read again" in other.stderr
    model = talk(endless, "--session", "s", "--max-tokens", "2")
    assert (model.returncode, model.stdout) == (0, b"line 100\nline 101\n") and b"another model (" in model.stderr
    assert [turn["user"] for turn in last_document(state)["turns"]] == ["x", "x", "x"]


def test_row_28_a_session_whose_model_was_changed_in_place(talk, state, copy):
    folder = copy()
    talk(folder, "--session", "s")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes())                # the same bytes, at another time: nobody can tell without reading them
    result = talk("--session", "s")
    assert (result.returncode, result.stdout) == (0, SAID) and b"another model" in result.stderr


def test_row_28_a_file_in_the_place_of_a_session(talk, state, scripted):
    folder_of(state).parent.mkdir(parents=True)
    folder_of(state).write_text("not a folder")
    result = talk(scripted, "--session", "s")
    assert result.returncode == 9 and result.stderr.count(b"\n") == 1 and b"sessions/s" in result.stderr
    assert folder_of(state).read_text() == "not a folder"

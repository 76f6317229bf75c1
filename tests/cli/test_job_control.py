"""Ctrl-Z, a terminal that closes, and what a chat that is not saved leaves: on a real pseudo-terminal."""

import os
import re
import signal
import subprocess
import termios
import time

import pytest

from .conftest import KVRUN, last_document
from .terminal import Screen


@pytest.fixture
def shell(environment, state, endless):
    """A chat that answers without end, in a shell with job control."""
    screen = Screen(["bash", "--norc", "-i"], environment | state | {"PS1": "$ "}, columns=120, rows=40)
    screen.wait_for("$")
    screen.send(" ".join([*KVRUN, "chat", str(endless), "-n", "100000"]) + "\r")
    screen.wait_prompt()
    yield screen
    screen.process.close(force=True)


def _stopped(screen: Screen, times: int = 1) -> None:
    """Ctrl-Z, and the shell's prompt."""
    screen.send("\x1a")
    screen.wait(lambda display: display.count("Stopped") == times and re.search(r"^\$$", display.split("\n")[-1]))


def test_ctrl_z_at_the_prompt_keeps_what_was_typed(shell):
    shell.send("half a line")
    shell.wait_for("> half a line")
    _stopped(shell)
    shell.send("fg\r")
    assert "^Z" not in shell.wait_for("> half a line")
    shell.send("\x03")
    shell.wait_prompt()


def test_after_ctrl_z_amid_an_answer_the_terminal_is_the_chats_again(shell):
    """No echo of what is typed ahead, and Enter ends a message."""
    shell.send("go\r")
    shell.wait_for("line 120")
    _stopped(shell)
    shell.send("fg\r")
    shell.wait(lambda display: display.split("\n")[-1].startswith("line"))
    assert not termios.tcgetattr(shell.process.child_fd)[3] & termios.ECHO
    shell.send("/undo\r")
    while shell.read(0.2) and "/undo" in shell.display:
        pass
    shell.send("\x03")
    shell.wait_prompt()
    assert "^C" not in shell.display and "/undo" not in shell.display
    _stopped(shell, 1 + shell.display.count("Stopped"))


def test_what_was_said_before_ctrl_c_reaches_the_screen(environment, state, endless):
    """Also where the terminal lags behind; what was typed ahead is dropped."""
    screen = Screen([*KVRUN, "chat", str(endless), "-n", "100000"], environment | state)
    screen.wait_prompt()
    screen.send("go\r")
    screen.wait_for("line 120")
    screen.send("typed ahead\r")
    time.sleep(0.5)  # the answer waits for somebody to read it
    screen.send("\x03")
    screen.wait_prompt()
    screen.ask("/context", "1 turn, ")
    shown = screen.raw.decode().replace("\r\n", "\n")
    assert last_document(state)["turns"][0]["assistant"].strip() + "\n" in shown and "typed" not in shown
    screen.send("\x04")
    assert screen.end() == 0


def test_a_terminal_that_closes_amid_an_answer_leaves_it_saved(environment, state, endless):
    screen = Screen([*KVRUN, "chat", str(endless), "-n", "100000"], environment | state)
    screen.wait_prompt()
    screen.send("go\r")
    screen.wait_for("line 120")
    screen.process.ptyproc.fileobj.close()
    screen.process.ptyproc.wait()
    assert screen.process.ptyproc.exitstatus == 128 + signal.SIGHUP
    assert last_document(state)["turns"][0]["assistant"].startswith("line 100\nline 101\n")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_chat_that_is_not_saved_leaves_nothing(environment, state, scripted, tmp_path, rng, signum):
    """However it ends, from its first moment on; what earlier chats left in the history is offered, and nothing is added."""
    places = environment | state | {"TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    history = tmp_path / "state/kvrun/chat_history"
    history.parent.mkdir(parents=True)
    history.write_text("\n# then\n+said before\n")
    command = [*KVRUN, "chat", str(scripted), "--no-save"]
    screen = Screen(command, places)
    screen.wait_prompt()
    screen.ask("a secret", "Welt")
    screen.ask("/save kept", "error: this chat leaves nothing behind")
    assert "stays in session" not in screen.ask("/clear", "the conversation is forgotten")
    screen.send("\x1b[A\x1b[A\x1b[A\x1b[A")
    screen.wait_for("> said before")
    os.kill(screen.process.pid, signum)
    assert screen.end() == 128 + signum
    for _ in range(3):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=places)
        while not os.listdir(tmp_path / "tmp"):
            assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, 0.1))
        process.send_signal(signum)
        assert process.wait(60) == 128 + signum
        process.stdin.close()
    assert not os.listdir(tmp_path / "tmp") and history.read_text() == "\n# then\n+said before\n"
    assert not (tmp_path / "state/kvrun/sessions").exists()


def test_prompts_line_by_line_leave_nothing_when_ended(environment, scripted, tmp_path):
    process = subprocess.Popen([*KVRUN, "run", str(scripted), "--each"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment | {"TMPDIR": str(tmp_path)})
    process.stdin.write(b"a\n")
    process.stdin.flush()
    assert process.stdout.readline().startswith(b'{"input": "a"') and os.listdir(tmp_path)
    process.terminate()
    assert process.wait(60) == 143 and not os.listdir(tmp_path)
    process.stdin.close()
    process.stdout.close()

"""Rows 13 to 18: what a terminal, a signal or a pipe does to the command, and what a model would like to do to a terminal."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess

import pytest
from safetensors.numpy import load_file, save_file

from ..cli.conftest import HOSTILE, KVRUN, LINES, last_document
from ..cli.terminal import Screen
from ..engine.tiny_model import random_model, scripted_model
from .conftest import check

SHOWN = "safe \\x1b]52;c;cm0=\\x07\\x1b[2J\\x9b31mred\\u202etxt [bold]markup[/bold]\\x1b]0;title\\x07 世 end"
LINK = [b"see \x1b]", b"8;;http://evil.example\x1b", b"\\here\x1b]8;;", b"\x1b\\ and \x1bP", b"q#0\x1b\\ \xe2\x81", b"\xa6iso"]


def test_row_13_run_shows_what_a_terminal_would_execute(terminal, hostile, tmp_path):
    screen = terminal("run", hostile, "x", columns=200)
    assert screen.end() == 0
    # pyte gives a wide character a second, empty cell
    assert screen.display.replace("世 ", "世") == SHOWN or screen.display == SHOWN
    assert screen.screen.title == "" and b"\x1b]" not in screen.raw and b"\x07" not in screen.raw
    screen = terminal("run", scripted_model(tmp_path / "m", LINK), "x", columns=200)
    assert screen.end() == 0
    assert "see \\x1b]8;;http://evil.example\\x1b\\here\\x1b]8;;" in screen.display and "\\u2066iso" in screen.display
    assert b"\x1b]8" not in screen.raw and b"\x1bP" not in screen.raw


def test_row_13_run_passes_it_on_when_asked_to(terminal, kvrun, hostile):
    screen = terminal("run", hostile, "x", "--sanitize", "never", "-q")
    assert screen.end() == 0
    assert b"".join(HOSTILE) in screen.raw
    assert kvrun("run", hostile, "x").stdout == b"".join(HOSTILE) + b"\n"       # a pipe gets the bytes


def test_row_13_chat_shows_what_a_terminal_would_execute(terminal, hostile):
    screen = terminal("chat", hostile, columns=200)
    screen.wait_prompt()
    screen.send("x\r")
    screen.wait_for(SHOWN.partition(" 世")[0])
    screen.wait_prompt()
    assert screen.screen.title == ""


def test_row_14_markup_in_names_and_answers_is_printed_as_it_is(terminal, kvrun, scripted, tmp_path):
    """Folders, tensors, sessions' texts and answers that look like rich's markup, or hold escapes."""
    name = "[red]m[x] [link=a.b]\x1b[2J"
    folder = shutil.copytree(scripted, tmp_path / name)
    shown = name.replace("\x1b", "\\x1b")
    for args in (("show", folder), ("plan", folder)):
        screen = terminal(*args, columns=400, rows=60)
        assert screen.end() == 0 and shown in screen.display, screen.display
        assert b"\x1b[2J" not in screen.raw
        assert name in kvrun(*args).stdout.decode()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.[/x][bold]\x1b]0;t\x07"] = tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    check(kvrun("run", folder, "x"), 5, shown, "[/x][bold]\\x1b]0;t\\x07")
    screen = terminal("run", folder, "x", columns=400)
    assert screen.end() == 5 and "[/x][bold]" in screen.display and screen.screen.title == ""
    answers = scripted_model(tmp_path / "m", [b"[/x]", b"[red]a[/red] ", b":smile: ", b"[link=http://a.b]c[/link]"])
    screen = terminal("chat", answers, columns=200)
    screen.wait_prompt()
    screen.ask("[bold]hi[/]", "[/x][red]a[/red] :smile: [link=http://a.b]c[/link]")
    assert b"\x1b]8;" not in screen.raw


class Shell:
    """A command in a shell that says its exit code and whether the terminal is as it was."""

    def __init__(self, environment, *args):
        self.screen = Screen(["bash", "--norc", "-i"], environment | {"PS1": "$ "}, columns=120, rows=40)
        self.screen.wait_for("$")
        command = " ".join([*KVRUN, *map(str, args)])
        self.screen.send(f"stty -a > before; {command}; echo code $?; stty -a | diff - before && echo sane\r")

    def ended(self, code: int) -> str:
        self.screen.wait_for(f"code {code}")
        shown = self.screen.wait(lambda display: re.search(r"^sane$", display, re.M))
        assert "Traceback" not in shown
        assert b"\x1b[?25l" not in self.screen.raw.split(b"\x1b[?25h")[-1], "the cursor is hidden"
        self.screen.process.close(force=True)
        return shown


def test_row_15_ctrl_c_ends_run_with_130(environment, endless, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shell = Shell(environment, "run", endless, "x", "-n", "100000")
    shell.screen.wait_for("line 120")
    shell.screen.send("\x03")
    shell.ended(130)


def test_row_15_ctrl_c_in_the_prefill_of_run(environment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = random_model(tmp_path / "m", 9, layers=6)
    (tmp_path / "long").write_text("long " * 9000)
    shell = Shell(environment, "run", folder, "-f", tmp_path / "long", "x", "-n", "60000", "--device", "reference", "--no-prompt-cache")
    shell.screen.wait_for("reading the prompt")
    shell.screen.send("\x03")
    assert "reading the prompt" not in shell.ended(130).split("code 130")[1]


def test_row_15_ctrl_c_stops_the_answer_and_keeps_the_chat(terminal, endless):
    screen = terminal("chat", endless, "-n", "100000", "--stats", rows=40, columns=200)
    screen.wait_prompt()
    screen.send("go\r")
    screen.wait_for("line 120")
    screen.send("\x03")
    shown = screen.wait_prompt()
    first = re.findall(r"answer (\d+) tok .* ctx (\d+)/100000 .* interrupt", shown)
    assert len(first) == 1 and "Traceback" not in shown
    screen.send("again\r")
    screen.wait(lambda display: display.count("line 1") > 20 and display.split("\n")[-1].startswith("line"))
    screen.send("\x03")
    shown = screen.wait_prompt()
    cached = re.findall(r"prompt (\d+) tok \((\d+) cached\)", shown)
    assert cached, shown
    # the whole first turn, partial answer included, was still in the cache
    assert int(cached[-1][1]) == int(first[0][1])
    screen.send("\x03")     # an impatient one, which finds an empty prompt
    screen.wait_for("Ctrl-C again, or Ctrl-D, leaves")
    screen.wait_prompt()
    screen.send("\x03")
    assert screen.end() == 0


def test_row_15_ctrl_c_in_prefill_takes_the_message_back(chat, tmp_path):
    screen = chat(random_model(tmp_path / "m", 9, layers=6), "-n", "60000", "--device", "reference", "--max-tokens", "3")
    screen.send("\x1b[200~" + "long " * 9000 + "\x1b[201~")
    screen.wait_for("long long")
    screen.send("\r")
    screen.wait_for("reading: ")
    screen.send("\x03\x03\x03")  # an impatient second one does not end the chat
    screen.wait_for("the message was taken back; Up brings it here")
    assert screen.wait_prompt().split("\n")[-1].startswith("ctx 0/60000 ") and "reading" not in screen.display
    shown = screen.display
    screen.send("\x1b[A")
    screen.wait(lambda display: display != shown and display.split("\n")[-2].endswith("long"))
    screen.send("\x03")
    screen.wait_prompt()
    screen.ask("/context", "0 turns, 0 tokens read and said")
    screen.ask("short", "tok/s")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_row_16_sigterm_in_an_answer_saves_what_was_said(environment, state, endless, signum):
    screen = Screen([*KVRUN, "chat", str(endless), "-n", "100000"], environment | state)
    screen.wait_prompt()
    screen.send("go\r")
    screen.wait_for("line 120")
    os.kill(screen.process.pid, signum)
    assert screen.end() == 128 + signum
    turn = last_document(state)["turns"][0]
    assert turn["user"] == "go" and turn["assistant"].startswith("line 100\nline 101\n") and len(turn["said"]) > 20


def test_row_16_sigterm_ends_run_with_143_after_what_was_said(environment, endless):
    process = subprocess.Popen([*KVRUN, "run", str(endless), "x", "-n", "100000"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, bufsize=0, env=environment)
    first = process.stdout.readline()
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err == b""
    assert (first + out).splitlines(keepends=True) == (LINES * 2000)[:(first + out).count(b"\n")]


@pytest.mark.parametrize("form", ["", "--jsonl", "--stats"])
def test_row_17_a_reader_that_leaves_ends_it_silently_with_141(environment, endless, form):
    command = f'{" ".join(KVRUN)} run {endless} x --max-tokens 100000 {form} | head -1; echo "${{PIPESTATUS[0]}}"'
    result = subprocess.run(["bash", "-c", command], capture_output=True, env=environment, timeout=120)
    first, code = result.stdout.splitlines()
    assert code == b"141" and result.stderr == b"" and first.startswith(b'{"event"' if form == "--jsonl" else b"line 100")


def test_row_18_a_pipe_that_nobody_closes_is_named(environment, scripted, tmp_path):
    screen = Screen(["bash", "-c", f"(echo some; sleep 2; touch {tmp_path}/closed) | {' '.join(KVRUN)} run {scripted} x"], environment)
    screen.wait_for("waiting for standard input to end: 5 B")
    assert screen.end() == 0 and "waiting" not in screen.display and (tmp_path / "closed").exists()


def test_row_18_no_prompt_is_never_a_conversation(kvrun, scripted):
    check(kvrun("run", scripted), 2, "prompt is empty")
    check(kvrun("run", scripted, ""), 2, "prompt is empty")
    check(kvrun("run", scripted, " \n"), 2, "prompt is empty")
    check(kvrun("run", scripted, "-"), 2, "prompt is empty")
    check(kvrun("run", scripted, input=b"\n"), 2, "prompt is empty")
    check(kvrun("chat", scripted), 2, "kvrun run")

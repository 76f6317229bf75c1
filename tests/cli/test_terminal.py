"""What a person sees: run and chat on a real pseudo-terminal, read back as a screen."""

import os
import re
import signal
import stat
import sys

import pytest

from ..engine.tiny_model import TEMPLATE, scripted_model
from .conftest import KVRUN
from .terminal import Screen



def test_run_leaves_no_progress_behind(terminal, random_folder):
    screen = terminal("run", random_folder, "word " * 300, "--max-tokens", "3", "--stats", "-n", "4096", columns=300)
    assert screen.end() == 0
    lines = screen.display.split("\n")
    assert lines[-1].startswith("prompt ") and "reading" not in screen.display and "loading" not in screen.display


def test_a_long_prompt_is_seen_to_be_encoded(terminal, random_folder, tmp_path):
    (tmp_path / "long").write_text("word " * 200_000)
    screen = terminal("run", random_folder, "-f", tmp_path / "long", columns=300)
    screen.wait_for("encoding the prompt: 977 KiB")
    assert screen.end() == 7 and "encoding" not in screen.display


def test_lines_of_ours_break_between_words(terminal, scripted):
    screen = terminal("chat", scripted, columns=60, rows=50)
    screen.wait_prompt()
    shown = screen.ask("/help", "at an empty prompt")
    assert "\n/load NAME           go on with another session\n" in shown
    assert f"\n/undo [N]            take back the last turn, or the last N;\n{'':<21}nothing is read again\n/regen" in shown
    refused = terminal("run", "x" * 70, "hi", columns=60)
    assert refused.end() == 3 and ("x" * 70).encode() in refused.raw, "a name is never broken"
    assert "folder, org/name or .gguf file of that name;\n'kvrun ls" in refused.display


def test_figures_stand_in_the_columns_of_a_terminal(terminal, scripted, tmp_path):
    """80 of them; sentences break between words."""
    (tmp_path / "text").write_text("word " * 200)
    for command in (("bench", "--repeat", "1", "--depth", "0"), ("compare", "-f", tmp_path / "text", "-n", "512"), ("plan",)):
        screens = [terminal(command[0], scripted, *command[1:], columns=columns, rows=60) for columns in (80, 300)]
        assert [screen.end() for screen in screens] == [0, 0]
        narrow, wide = ([line for line in screen.display.split("\n") if line.strip()] for screen in screens)
        words = [re.sub(r"[\d.]+", "0", " ".join(display)).split()[:12] for display in (narrow, wide)]
        assert max(map(len, wide[1:])) <= 80 and words[0] == words[1]


def test_a_row_of_a_table_ends_at_the_edge(terminal):
    narrow, wide = (terminal("ls", "--aliases", columns=columns, rows=60) for columns in (60, 300))
    assert (narrow.end(), wide.end()) == (0, 0)
    assert re.search(r"^smollm2-135m +HuggingFaceTB/SmolLM2-135M-Instruct .*…$", narrow.display, re.M)
    assert len(narrow.display.split("\n")) == len(wide.display.split("\n")) and "…" not in wide.display


def test_no_escape_on_a_dumb_or_colourless_terminal(terminal, random_folder):
    dumb = terminal("run", random_folder, "x", "--max-tokens", "3", "--stats", env={"TERM": "dumb"})
    assert dumb.end() == 0 and b"\x1b" not in dumb.raw.split(b"prompt ")[-1] and b"\r\x1b" not in dumb.raw
    plain = terminal("run", "./absent.gguf", "x", env={"NO_COLOR": "1"})
    assert plain.end() == 3 and b"\x1b" not in plain.raw
    colored = terminal("run", "./absent.gguf", "x")
    assert colored.end() == 3 and b"\x1b[1;31mkvrun: error:\x1b[0m" in colored.raw


def test_ctrl_c_at_any_moment_of_the_start_shows_no_trace(environment, random_folder, rng):
    """From the first line of ours to the first token; what the interpreter does before is out of reach."""
    code = "import signal; signal.signal(2, signal.SIG_DFL); print('up', flush=True)\nfrom kvrun.__main__ import main; raise SystemExit(main())"
    for _ in range(6):
        screen = Screen([sys.executable, "-c", code, "run", str(random_folder), "word " * 300, "-n", "100000", "--temp", "0"],
                        environment)
        screen.wait_for("up")
        screen.read(rng.uniform(0.0, 0.8))
        screen.send("\x03")
        assert screen.end() in (130, -signal.SIGINT) and "Traceback" not in screen.display, screen.display


def test_a_conversation(terminal, tmp_path, home):
    folder = scripted_model(tmp_path / "m", [b"Hello", b" there\n", b"friend"])
    screen = terminal("chat", folder)
    screen.wait_prompt()
    assert "> hi\nHello there\nfriend\n>" in screen.ask("hi", "friend")
    screen.ask("/hlep", "did you mean /help?")
    screen.ask("/help", "/clear ")
    screen.ask("/clear now", "/clear takes no argument")
    screen.ask("/clear", "forgotten")
    screen.ask("//slash", "friend")
    screen.send("\x1b[A")  # the last line of the history
    screen.wait_for("> //slash\n".rstrip())
    screen.send("\x15/exit\r")
    assert screen.end() == 0
    history = home / ".local/state/kvrun/chat_history"
    assert "+hi\n" in history.read_text() and stat.S_IMODE(history.stat().st_mode) == 0o600


def test_ctrl_c_while_a_message_is_encoded_takes_it_back(terminal, tmp_path):
    """A template that works for a third of a second: Ctrl-C comes before the first prompt token is read."""
    slow = "{% for i in range(900) %}{% for j in range(3000) %}{% endfor %}{% endfor %}" + TEMPLATE
    screen = terminal("chat", scripted_model(tmp_path / "m", [b"said"], template=slow))
    screen.wait_prompt()
    accepted = screen.raw.count(b"\x1b[?2004l")
    screen.send("hi\r")
    while screen.raw.count(b"\x1b[?2004l") == accepted:
        screen.read()
    screen.send("\x03")
    assert "the message was taken back" in screen.wait_prompt() and "said" not in screen.display
    screen.send("\x04")
    assert screen.end() == 0


def test_ctrl_c_takes_back_a_line_and_twice_leaves(terminal, scripted):
    screen = terminal("chat", scripted)
    screen.wait_prompt()
    screen.send("half a li")
    screen.wait_for("> half a li")
    screen.send("\x03")
    assert "again" not in screen.wait_prompt()
    screen.send("\x03")
    screen.wait_for("Ctrl-C again")
    screen.wait_prompt()
    screen.ask("hi", "Welt")
    screen.send("\x03")
    screen.wait(lambda display: display.count("Ctrl-C again") == 2)
    screen.wait_prompt()
    screen.send("\x03")
    assert screen.end() == 0


def test_a_pasted_text_of_many_lines_is_one_message(terminal, scripted):
    screen = terminal("chat", scripted, "--stats")
    screen.wait_prompt()
    pasted = "".join(f"pasted {i}\n" for i in range(500))
    screen.send(f"\x1b[200~{pasted}\x1b[201~")
    screen.wait_for("pasted 499")
    shown = screen.ask("", "Welt")
    assert shown.count("Welt") == 1
    assert int(re.findall(r"prompt (\d+) tok", shown)[0]) > len(pasted)


def test_ctrl_d_leaves(terminal, scripted):
    screen = terminal("chat", scripted)
    screen.wait_prompt()
    screen.send("\x04")
    assert screen.end() == 0


def test_typing_ahead_does_not_show_amid_the_answer(terminal, endless):
    screen = terminal("chat", endless, "-n", "100000", "--max-tokens", "2000", rows=40)
    screen.wait_prompt()
    screen.send("go\r")
    screen.wait_for("line 101")
    screen.send("typed ahead")
    shown = screen.wait(lambda display: "\n> typed ahead" in display)
    assert shown.count("typed ahead") <= 1 and not re.search(r"line.*typed", shown)


def test_messages_typed_ahead_are_taken_in_turn(terminal, endless):
    """Enter ends a message also while an answer comes."""
    screen = terminal("chat", endless, "-n", "100000", "--max-tokens", "1000", "--stats", rows=40, columns=160)
    screen.wait_prompt()
    screen.send("go\r")
    screen.wait_for("line 101")
    screen.send("next\r/undo\r")
    shown = screen.wait(lambda display: "took back 1 turn, 1 turn left" in display)
    assert re.search(r"^> next\nline 1", shown, re.M) or len(re.findall("answer 1000 tok", shown)) == 1
    assert "/undo" in shown and re.search(r"^> /undo$", shown, re.M), shown
    assert re.search(r"ctx 1\d\d\d/100000", screen.wait_prompt().split("\n")[-1])


class Terminated:
    """A chat in a shell that says its exit code and what became of the terminal."""

    def __init__(self, environment, *args):
        self.shell = Screen(["bash", "--norc", "-i"], environment | {"PS1": "$ "}, columns=120, rows=40)
        self.shell.wait_for("$")
        command = " ".join([*KVRUN, "chat", *map(str, args)])
        self.shell.send(f"stty -a > before; bash -c 'echo pid=$$; exec {command}'; echo code $?; stty -a | diff - before && echo sane\r")
        self.pid = int(self.shell.wait(lambda display: re.search(r"^pid=(\d+)$", display, re.M)) and
                       re.search(r"^pid=(\d+)$", self.shell.display, re.M)[1])

    def kill(self):
        os.kill(self.pid, signal.SIGTERM)
        self.shell.wait_for("code 143")
        shown = self.shell.wait_for("sane")
        assert "Traceback" not in shown and "Exception" not in shown and "Press ENTER" not in shown, shown
        assert b"\x1b[?25l" not in self.shell.raw.split(b"\x1b[?25h")[-1], "the cursor is hidden"
        self.shell.process.close(force=True)


@pytest.fixture
def terminated(environment, tmp_path, monkeypatch):
    """terminated(*args of chat) -> Terminated"""
    monkeypatch.chdir(tmp_path)
    return lambda *args: Terminated(environment, *args)


def test_sigterm_ends_the_chat_with_143_and_a_sane_terminal(terminated, scripted):
    chat = terminated(scripted)
    chat.shell.wait_prompt()
    chat.shell.send("half a line")
    chat.shell.wait_for("half a line")
    chat.kill()


def test_sigterm_in_an_answer(terminated, endless):
    chat = terminated(endless, "-n", "100000")
    chat.shell.wait_prompt()
    chat.shell.send("go\r")
    chat.shell.wait_for("line 120")
    chat.kill()


def test_sigterm_in_prefill(terminated, random_folder):
    chat = terminated(random_folder, "-n", "60000", "--device", "reference")
    chat.shell.wait_prompt()
    chat.shell.send("\x1b[200~" + "long " * 10000 + "\x1b[201~")
    chat.shell.wait_for("long long")
    chat.shell.send("\r")
    chat.shell.wait_for("reading")
    chat.kill()


def test_sigterm_while_a_template_renders(terminated, tmp_path):
    template = "{% for m in messages %}{% if 'slow' in m['content'] %}{% for i in range(10**9) %}{% endfor %}{% endif %}{% endfor %}<turn>"
    chat = terminated(scripted_model(tmp_path / "m", [b"fine"], template=template))
    chat.shell.wait_prompt()
    chat.shell.send("slow\r")
    chat.shell.wait_for("> slow\n")
    chat.kill()


def test_sigterm_at_any_moment(terminated, scripted, rng):
    """From the first line of ours on: while modules load, the model opens, the prompt comes up."""
    for _ in range(5):
        chat = terminated(scripted)
        chat.shell.read(rng.uniform(0.0, 1.2))
        chat.kill()


def test_a_conversation_through_a_pipe(kvrun, tmp_path):
    folder = scripted_model(tmp_path / "m", [b"yes", b"!"])
    result = kvrun("chat", folder, input=b"one\n\n//two\n/nope\nca\xe9\nthree")
    assert result.stdout == b"yes!\n" * 3 and result.returncode == 0
    assert b"/nope: no such command" in result.stderr and b"line 5" in result.stderr and b"\x1b" not in result.stderr


def test_a_full_context_in_a_pipe_is_an_exit_code(kvrun, endless):
    result = kvrun("chat", endless, "-n", "64", input=b"go\n/clear\nmore\n")
    assert result.returncode == 7 and result.stderr.count(b"context full: the answer was cut at 64 tokens") == 2 and result.stdout.count(b"line 100\n") == 2
    assert kvrun("chat", endless, "-n", "4096", "--max-tokens", "3", input=b"go\n").returncode == 0


def test_a_base_model_has_no_chat(kvrun, without_template):
    result = kvrun("chat", without_template, input=b"hi\n")
    assert result.returncode == 2 and b"no chat template" in result.stderr and result.stdout == b""


def test_a_history_that_cannot_be_written_is_said(terminal, scripted, tmp_path):
    (tmp_path / "state").write_text("a file, not a folder")
    screen = terminal("chat", scripted, env={"XDG_STATE_HOME": str(tmp_path / "state")}, columns=200)
    screen.wait_for("history")
    screen.wait_for("will not be saved")
    screen.wait_prompt()
    screen.ask("hi", "Welt")
    screen.ask("/undo", "took back 1 turn")

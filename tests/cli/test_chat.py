"""A chat that people keep open: its commands, its sessions and its screen, on a real pseudo-terminal."""

import json
import re
import subprocess

from ..engine.tiny_model import scripted_model
from .conftest import HOSTILE, KVRUN, last_document
from .terminal import Screen


def leave(screen):
    screen.send("/exit\r")
    assert screen.end() == 0


def test_edit_and_regen(chat, scripted, state):
    screen = chat(scripted)
    screen.ask("frist", "Welt")
    screen.ask("/regen", "at temperature 0 the answer is the same")
    assert screen.display.count("Welt") == 2
    screen.send("/edit\r")
    screen.wait(lambda display: re.search(r"^> frist$", display.split("/edit")[-1], re.M))
    screen.send("\x15first\r")
    screen.wait(lambda display: display.count("Welt") == 3)
    screen.wait_prompt()
    screen.ask("/edit again", "Welt")
    leave(screen)
    assert [turn["user"] for turn in last_document(state)["turns"]] == ["again"]


def test_regen_draws_another_answer_and_reads_nothing(chat, random_folder):
    screen = chat(random_folder, "--temp", "1", "--top-k", "50", "--max-tokens", "12", "--seed", "1", "--stats", columns=200)
    screen.ask("hello", "answer 12 tok")
    shown = screen.ask("/regen", "answer 12 tok")
    assert re.search(r"prompt (\d+) tok \((\d+) cached\).*seed 2", shown)
    total, cached = re.findall(r"prompt (\d+) tok \((\d+) cached\)", shown)[-1]
    assert int(total) == int(cached) + 1


def test_a_chat_goes_on_after_it_was_left(chat, environment, state, random_folder):
    args = ("--temp", "1", "--top-k", "50", "--max-tokens", "20", "--seed", "3")
    screen = chat(random_folder, "--session", "both", *args)
    for message in ("one", "two"):
        screen.send(message + "\r")
        screen.wait(lambda display, message=message: re.search(rf"> {message}\n.+\n", display))
        screen.wait_prompt()
    leave(screen)
    both = last_document(state)

    def run(*args, input):
        return subprocess.run([*KVRUN, "chat", *args], input=input, capture_output=True, env=environment | state, timeout=60)

    # the model, the format, the seed and the settings are the session's own
    def last_turns():
        return [turn["said"] for turn in last_document(state)["turns"]]

    run(str(random_folder), *args, "--session", "third", input=b"one\n")
    assert run("-c", "--max-tokens", "20", input=b"two\n").returncode == 0
    assert last_turns() == [turn["said"] for turn in both["turns"]]


def test_sessions_are_listed_shown_exported_and_removed(environment, state, scripted, tmp_path):
    def run(*args, input=b""):
        return subprocess.run([*KVRUN, *map(str, args)], input=input, capture_output=True, env=environment | state, timeout=60)

    nothing = run("session", "ls")
    assert nothing.stdout == b"" and b"no sessions on this machine yet" in nothing.stderr and json.loads(run("session", "ls", "--json").stdout) == []
    nothing = run("chat", "-c", input=b"hi\n")
    assert nothing.returncode == 3 and b"no session to continue" in nothing.stderr
    assert run("chat", scripted, "--session", "a/b", input=b"hi\n").returncode == 2
    run("chat", scripted, "--session", "work", "-s", "be brief", input="hi\n/save copy\nhöher\n".encode())
    assert [row["name"] for row in json.loads(run("session", "ls", "--json").stdout)] == ["copy", "work"]
    listed = [line.split() for line in run("session", "ls").stdout.decode().splitlines()]
    assert listed[0] == ["NAME", "LAST", "USED", "SIZE", "TURNS", "TOKENS", "MODEL"] and [(row[0], row[5]) for row in listed[1:]] == [("copy", "2"), ("work", "1")]
    shown = run("session", "show", "copy")
    assert shown.returncode == 0 and b"   2  h\xc3\xb6her" in shown.stdout and b"system   be brief" in shown.stdout
    exported = json.loads(run("session", "export", "work", "--format", "json").stdout)
    assert exported["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"},
                                    {"role": "assistant", "content": "Größe,\nWelt"}]
    assert run("session", "export", "copy", "-o", tmp_path / "copy.md").stdout == b""
    assert "\n## User\n\nhöher\n\n## Assistant\n\nGröße,\nWelt\n" in (tmp_path / "copy.md").read_text("utf-8")
    assert run("session", "show", "absent").returncode == 3 and run("session", "show", "absent", "-v").stderr.startswith(b"Traceback")
    removed = run("session", "rm", "work", "copy", "work")
    assert removed.returncode == 0 and [line.split()[2] for line in removed.stdout.splitlines()] == [b"work", b"copy"]
    assert run("session", "ls").stdout == b""


def test_clear_and_load_lose_nothing(chat, scripted):
    screen = chat(scripted, "--session", "first")
    screen.ask("hi", "Welt")
    screen.ask("/clear", "it stays in session first")
    screen.ask("/context", "0 turns")
    screen.ask("/load first", "session first: 1 turn")
    screen.ask("/context", "1 turn")
    screen.ask("/load first", "is open here")
    screen.ask("/load absent", "no session is named absent")
    screen.ask("/save first", "saved as session first")
    screen.ask("/save second", "saved as session second")
    screen.ask("/save first", "there is a session first already")


def test_a_second_process_is_refused_a_session(chat, environment, state, scripted):
    chat(scripted, "--session", "busy").ask("hi", "Welt")
    other = subprocess.run([*KVRUN, "chat", str(scripted), "--session", "busy"], input=b"hi\n", capture_output=True, env=environment | state)
    assert other.returncode == 2 and b"open in another process" in other.stderr and other.stderr.count(b"\n") == 1


def test_the_size_limit_is_kept_aloud(environment, state, scripted):
    def run(*args):
        return subprocess.run([*KVRUN, *map(str, args)], input=b"x\n", capture_output=True, env=environment | state, timeout=60)

    run("chat", scripted, "--session", "old")
    said = run("chat", scripted, "--session", "new", "--session-limit", "0").stderr
    assert b"the cache of session old, used longest ago, was removed; its conversation stays" in said
    listed = run("session", "ls").stdout.decode().splitlines()[1:]
    assert [line.endswith("text only") for line in listed] == [False, True] and all(line.split()[5] == "1" for line in listed)
    again = run("chat", scripted, "--session", "old")
    assert again.returncode == 0 and b"is no longer on disk: its conversation is read again" in again.stderr


def test_reasoning_is_shown_apart_or_hidden(chat, environment, state, tmp_path):
    thinker = scripted_model(tmp_path / "m", [b"<think>", b"\nhm, ", b"let me see", b"\n</th", b"ink>", b"\n\n", b"Yes", b"!"])
    screen = chat(thinker)
    shown = screen.ask("so?", "Yes!")
    assert re.search(r"> so\?\nhm, let me see\n\nYes!\n", shown) and "think>" not in shown
    assert b"\x1b[2mhm, \x1b[0m" in screen.raw
    screen.ask("/think hide", "reasoning: hide")
    screen.ask("/clear", "forgotten")
    assert re.search(r"> really\?\nYes!\n", screen.ask("really?", "Yes!"))
    piped = subprocess.run([*KVRUN, "chat", str(thinker)], input=b"so?\n", capture_output=True, env=environment | state)
    assert piped.stdout == b"Yes!\n" and piped.stderr.startswith(b"hm, let me see\n")


def test_markdown_is_rendered_and_nothing_in_it_executed(chat, tmp_path):
    folder = scripted_model(tmp_path / "m", [b"# Ti", b"tle\n", b"\n", b"* a **bold** word\n", b"* \x1b]0;evil\x07 [link](http://x.y)\n", b"\n ", b"\ndone"])
    screen = chat(folder, "--markdown")
    shown = screen.ask("x", "done")
    assert "**" not in shown and "• a bold word" in shown and "\\x1b]0;evil" in shown
    assert b"\x1b]8;" not in screen.raw and screen.screen.title == ""


def test_until_a_block_of_markdown_is_complete_there_is_a_count(chat, endless):
    screen = chat(endless, "--markdown", "-n", "100000")
    screen.send("go\r")
    screen.wait(lambda display: re.search(r"^answering: \d+ tokens$", display, re.M))
    screen.send("\x03")
    screen.wait_for("line 100 line 101")
    assert "answering" not in screen.wait_prompt()


def test_tab_completes_commands_paths_and_settings(chat, scripted, tmp_path):
    (tmp_path / "a-long-name.txt").write_text("text")
    screen = chat(scripted)
    screen.send("/reg\t")
    screen.wait_for("> /regen")
    screen.send("\x15/read " + str(tmp_path) + "/a-l\t")
    screen.wait(lambda display: "a-long-name.txt" in display.replace("\n", ""))
    screen.send("\x15/set rep\t")
    screen.wait_for("/set repeat-penalty")


def test_a_message_of_several_lines(chat, scripted, state):
    screen = chat(scripted)
    screen.send("one\x1b\r")
    screen.wait_for("> one\n")
    screen.send("two")
    screen.wait_for("\n  two")
    screen.ask("", "Welt")
    leave(screen)
    assert last_document(state)["turns"][0]["user"] == "one\ntwo"


def test_wide_and_combining_characters_and_a_resize(chat, state, tmp_path):
    answer = "日本 Größe e\u0301 🎉 " + "世界" * 30 + " end"
    data = answer.encode()
    screen = chat(scripted_model(tmp_path / "m", _pieces(data)), columns=60)
    message = "日本語 " * 12 + "e\u0301 🎉 end"
    screen.send(message)
    screen.wait_for("end")
    assert _lines(screen, "> 日")[0] == "> " + "日本語 " * 8 + "日" and "日本語 é 🎉 end" in _text(screen)
    screen.process.setwinsize(30, 40)
    screen.screen.resize(30, 40)
    screen.wait(lambda display: "end" in display and display.count("日") >= 12)
    assert all(len(line) <= 40 for line in screen.display.split("\n"))
    screen.send("\r")
    screen.wait(lambda display: display.count("end") == 2)
    screen.wait_prompt()
    shown = "".join(_lines(screen, "日本 Gr"))
    assert shown.startswith("日本 Größe é 🎉 世界") and shown.replace("\n", "").split(" end")[0].endswith("世界")
    leave(screen)
    turn = last_document(state)["turns"][0]
    assert (turn["user"], turn["assistant"]) == (message, answer)


def _pieces(data: bytes) -> list[bytes]:
    """Cut into tokens of three bytes, inside characters too, all different."""
    pieces, at = [], 0
    while at < len(data):
        size = next(n for n in range(3, 60) if data[at : at + n] not in pieces)
        pieces.append(data[at : at + size])
        at += size
    return pieces


def _text(screen) -> str:
    """The screen with wide characters as one each; pyte gives them a second, empty cell."""
    return "\n".join("".join(cell.data for cell in (line[x] for x in range(screen.screen.columns))).rstrip() for line in
                     (screen.screen.buffer[y] for y in range(screen.screen.lines)))


def _lines(screen, begin: str) -> list[str]:
    """From the last line that begins so on."""
    lines = _text(screen).split("\n")
    return lines[max(i for i, line in enumerate(lines) if line.startswith(begin)) :]


def test_a_chat_that_is_not_saved_leaves_nothing(environment, state, scripted, tmp_path):
    result = subprocess.run([*KVRUN, "chat", str(scripted), "--no-save"], input=b"one\n/undo\ntwo\n", capture_output=True,
                            env=environment | state | {"TMPDIR": str(tmp_path)}, timeout=60)
    assert result.returncode == 0 and b"took back 1 turn" in result.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("kvrun-")] == [] and not (tmp_path / "state/kvrun/sessions").exists()


def test_an_exported_session_is_shown_and_not_executed_on_a_terminal(environment, state, hostile):
    subprocess.run([*KVRUN, "chat", str(hostile), "--session", "s"], input=b"a \x1b[31mred one\n", capture_output=True, env=environment | state, timeout=60)
    for command in (["export", "s"], ["export", "s", "--format", "json"], ["show", "s"], ["show", "s", "--json"], ["ls"]):
        screen = Screen([*KVRUN, "session", *command], environment | state, columns=100)
        assert screen.end() == 0 and b"\x1b" not in screen.raw and screen.screen.title == "", command
        assert "ls" in command or "red one" in screen.display.replace("\n", "")
    piped = subprocess.run([*KVRUN, "session", "export", "s"], capture_output=True, env=environment | state, timeout=60)
    assert b"".join(HOSTILE) in piped.stdout

"""Every slash command on a real pseudo-terminal: what the screen shows between the command and the next prompt, line by line."""

import base64
import re

from kvrun.cli.slash import COMMANDS

from .terminal import Screen

ANSWER = ["Größe,", "Welt"]
STATUS = r"ctx \d+/8192 · kv f16 [\d.]+ [KM]iB"


def said(screen: Screen, line: str) -> list[str]:
    """Enters a line and waits for the next prompt. What the screen shows between the two."""
    before = screen.display.count(f"\n> {line}\n")
    screen.send(line + "\r")
    screen.wait(lambda display: display.count(f"\n> {line}\n") > before)
    lines = screen.wait_prompt().split("\n")
    start = max(i for i, shown in enumerate(lines) if shown == f"> {line}")
    end = max(i for i, shown in enumerate(lines) if shown == ">")
    assert start < end and re.fullmatch(STATUS + "( ·.*)?", lines[-1]), lines[-1]
    return lines[start + 1 : end]


def test_every_command(chat, scripted, tmp_path):
    """One conversation with all of them. In what is expected, <n> is any number, <name> a session's name, and a line may end in '...'."""
    (tmp_path / "notes.txt").write_text("remember the milk\n")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "binary").write_bytes(b"ELF\0")
    screen = chat(scripted, "-s", "be brief", env={"HOME": str(tmp_path)}, columns=180, rows=60)
    rate = r"<n> tok/s"
    stats = f"prompt <n> tok (<n> cached) in <n> s, {rate} · answer 4 tok in <n> s, {rate} · ctx <n>/8192 · kv f16 · cpu · greedy · eos"
    dialogue = [
        ("/undo", ["kvrun: error: there is no turn to take back"]),
        ("/regen", ["kvrun: error: there is no turn yet"]),
        ("/edit", ["kvrun: error: there is no turn yet"]),
        ("/copy", ["kvrun: error: there is no answer yet"]),
        ("/stats", ["no answer yet"]),
        ("/context", ["ctx 0/8192 · ...", "0 turns, system prompt of 8 characters, 0 tokens read and said"]),
        ("/hlep", ["/hlep: no such command; did you mean /help? (// begins a message with a slash)"]),
        ("/bye", ["/bye: no such command; did you mean /exit? (// begins a message with a slash)"]),
        ("/xyzzy", ["/xyzzy: no such command; /help lists them (// begins a message with a slash)"]),
        ("hi", ANSWER),
        ("//hi", ANSWER),
        ("/context", ["ctx <n>/8192 · ...", "2 turns, system prompt of 8 characters, <n> tokens read and said",
                      "   1      <n> read      4 said  hi", "   2      <n> read      4 said  /hi"]),
        ("/undo", ["took back 1 turn, 1 turn left"]),
        ("/undo 0", ["kvrun: error: /undo 0: give a whole number from 1 on"]),
        ("/regen", ["at temperature 0 the answer is the same; /set temp 0.8 makes others", *ANSWER]),
        ("/edit hello", ANSWER),
        ("/stats", [stats]),
        ("/stats on", []),
        ("again", [*ANSWER, stats]),
        ("/stats off", []),
        ("/stats maybe", ["kvrun: error: /stats maybe: give on or off"]),
        ("/system", ["system prompt: be brief"]),
        ("/system be long", ["the system prompt is changed; the conversation is read again with the next message"]),
        ("/set temp 0", ["temp            0.0"]),
        ("/set temp hot", ["kvrun: error: /set temp hot: give a number from 0 to 100"]),
        ("/set tmep", ["kvrun: error: /set tmep: no such setting; did you mean temp?"]),
        ("/set", ["temp            0.0", "top-p           1.0", "top-k           0", "min-p           0.0", "repeat-penalty  1.0", "seed            0",
                  "max-tokens      none"]),
        ("/read ~/notes.txt", [f"{tmp_path}/notes.txt: 18 bytes, read before your next message; /clear forgets them"]),
        ("/read ~/absent", [f"kvrun: error: cannot read {tmp_path}/absent: No such file or directory"]),
        ("/read ~/latin", [f"kvrun: error: {tmp_path}/latin is not UTF-8 text: byte 0xe9 at offset 3; convert it first (iconv) or give another file"]),
        ("/read ~/binary", [f"kvrun: error: {tmp_path}/binary is binary: a zero byte at offset 3; give text"]),
        ("/read", ["/read needs FILE"]),
        ("what?", ANSWER),
        ("/think", ["reasoning: show"]),
        ("/think hide", ["reasoning: hide"]),
        ("/think loud", ["kvrun: error: /think loud: give show or hide"]),
        ("/copy", ["11 characters given to the terminal's clipboard (some terminals must be told to allow it)"]),
        ("/save thesis", ["saved as session thesis: 'kvrun chat --session thesis' goes on with it"]),
        ("/load thesis", ["kvrun: error: session thesis is open here"]),
        ("/load absent", ["kvrun: error: no session is named absent; there are: thesis, <name>"]),
        ("/clear now", ["/clear takes no argument"]),
        ("/clear", ["the conversation is forgotten; it stays in session thesis; the system prompt stays"]),
        ("/save thesis", ["kvrun: error: there is a session thesis already; choose another name, or 'kvrun session rm thesis' first"]),
        ("/load thesis", ["kvrun: session thesis: 3 turns, <n> tokens in the cache"]),
        ("/context", ["ctx <n>/8192 · ...", "3 turns, system prompt of 7 characters, <n> tokens read and said", *["..."] * 3]),
        ("/undo 9", ["took back 3 turns, 0 turns left"]),
        ("/help", [f"/{command.name} ..." for command in COMMANDS.values()] + ["//... ...", "Alt-Enter, Ctrl-J  ...", "Ctrl-C ..."]),
    ]
    for line, expected in dialogue:
        shown = said(screen, line)
        assert len(shown) == len(expected) and all(map(_matches, expected, shown)), f"{line}:\n" + "\n".join(shown)
        if line.startswith("/read ~/notes"):
            assert screen.display.endswith(" · with notes.txt")
        if line == "what?":
            assert "notes.txt" not in screen.display.split("\n")[-1]
    assert b"\x1b]52;c;" + base64.b64encode("Größe,\nWelt".encode()) + b"\x07" in screen.raw
    assert {line[1:].split()[0] for line, _ in dialogue if line[0] == "/"} >= {*COMMANDS} - {"exit"}
    screen.send("/exit\r")
    assert screen.end() == 0 and screen.display.endswith("> /exit") and not screen.screen.cursor.hidden


def _matches(expected: str, shown: str) -> bool:
    pattern = re.escape(expected.removesuffix("...")).replace("<n>", r"[\d.]+").replace("<name>", r"[\w-]+")
    return re.fullmatch(pattern + (".*" if expected.endswith("...") else ""), shown) is not None

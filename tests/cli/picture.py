"""Draws the README's picture: a chat with a real model on a real pseudo-terminal, its last screen as SVG.

    python tests/cli/picture.py [.github/chat.svg]
"""

from __future__ import annotations

import argparse
import io
import os
import re
import tempfile
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.style import Style
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text
from terminal import Screen  # beside this file

TARGET = Path(__file__).parents[2] / ".github/chat.svg"
COLUMNS, ROWS = 92, 22
STOP = "\x03"
CHAT = [("What is the capital of France?", 0), ("And of Italy?", 0), ("Tell me a story about a dragon.", 10), ("/undo", 0), ("/context", 0)]
"""What is typed, and after how many words of the answer Ctrl-C is (0: never)."""

# As rich's own, without fonts from elsewhere.
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def record(folder: str) -> Screen:
    """The terminal after the chat. folder: where its session lies."""
    environment = os.environ | {"XDG_STATE_HOME": folder, "PS1": "$ ", "TERM": "xterm-256color", "LANG": "C.UTF-8"}
    screen = Screen(["bash", "--norc", "-i"], environment, columns=COLUMNS, rows=ROWS)
    screen.wait_for("$ ".rstrip())
    screen.send("kvrun chat smollm2-135m --kv q8 --temp 0\r")
    screen.wait_prompt()
    for line, words in CHAT:
        screen.send(line + "\r")
        screen.wait(lambda display, line=line: f"> {line}\n" in display)
        if words:
            screen.wait(lambda display, line=line: len(display.split(f"> {line}\n")[-1].split()) > words)
            screen.send(STOP)
        screen.wait_prompt()
    return screen


def styled(screen: Screen) -> Text:
    """The screen's cells as rich text."""
    text = Text(no_wrap=True)
    shown = screen.screen
    last = max(y for y in range(shown.lines) if shown.display[y].strip())
    for y in range(last + 1):
        cells = [shown.buffer[y][x] for x in range(shown.columns)]
        for (color, bold), run in groupby(cells, key=lambda cell: (cell.fg, cell.bold)):
            name = {"default": None, "brown": "yellow"}.get(color, re.sub("^bright", "bright_", color))
            text.append("".join(cell.data for cell in run), Style(color=name, bold=bold))
        text.append("\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, nargs="?", default=TARGET, help="the file to write; default: %(default)s")
    target = parser.parse_args().target
    with tempfile.TemporaryDirectory() as folder:
        screen = record(folder)
        console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
        console.print(styled(screen), end="")
        screen.process.close(force=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(console.export_svg(title="kvrun chat", theme=DIMMED_MONOKAI, code_format=SVG, unique_id="chat"), encoding="utf-8")
    print(f"{target}: {target.stat().st_size} bytes\n{screen.display}")


if __name__ == "__main__":
    main()

"""Markdown for a terminal, a block at a time: an answer is shown as its paragraphs, lists and code blocks become complete."""

from __future__ import annotations

import io
import re
import shutil

from kvrun.terminal.sanitize import visible

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")


class MarkdownBlocks:
    """Cuts streamed text at blank lines outside fenced code, where no list or quotation goes on. The blocks joined are the text."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> list[str]:
        """Blocks that are complete."""
        self._held += text
        blocks, start, fence, at = [], 0, "", 0
        lines = self._held.splitlines(keepends=True)
        for number, line in enumerate(lines):
            mark = _FENCE.match(line)
            if mark and not fence:
                fence = mark[1]
            elif fence and mark and mark[1].startswith(fence[0] * len(fence)) and not line.strip().strip(fence[0]):
                fence = ""
            at += len(line)
            follows = lines[number + 1] if number + 1 < len(lines) else ""
            # The next line must have begun: an indented one would go on with a list.
            if not fence and not line.strip() and follows.strip() and not follows[0].isspace():
                blocks.append(self._held[start:at])
                start = at
        self._held = self._held[start:]
        return blocks

    def flush(self) -> str:
        """The rest, which the end completes."""
        rest, self._held = self._held, ""
        return rest


def render(block: str, *, color: bool) -> str:
    """One block as terminal text, wrapped to the terminal's width. Control characters in it are shown, and links are not made active."""
    from rich.console import Console
    from rich.markdown import Markdown

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=min(shutil.get_terminal_size().columns, 120), highlight=False,
                      color_system="standard" if color else None, no_color=not color, legacy_windows=False)
    console.print(Markdown(visible(block), hyperlinks=False, code_theme="ansi_dark"))
    return out.getvalue()

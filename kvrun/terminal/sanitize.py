"""Foreign text made harmless: what a terminal would execute is shown instead.

A control sequence needs an introducer (ESC, or a C1 byte) and a spoof needs a bidi override; each is a single code
point, so replacing those code points one by one is complete however a sequence is split over tokens.
"""

from __future__ import annotations

_KEPT = "\n\t"
# C0, DEL and C1 (ECMA-48); LS and PS, which some terminals break lines at; bidi embeddings, overrides and isolates
# (Unicode TR9, the means of CVE-2021-42574); annotation anchors, which hide text; lone surrogates, which no UTF-8 has.
_HOSTILE = [
    *range(0x00, 0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A),
    *range(0xFFF9, 0xFFFC),
]


def _shown(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


_VISIBLE = {code: _shown(code) for code in _HOSTILE if chr(code) not in _KEPT}
_VISIBLE |= {code: "\ufffd" for code in range(0xD800, 0xE000)}
_ONE_LINE = _VISIBLE | {ord("\n"): "\\n", ord("\t"): "\\t"}
_JSON = {code: f"\\u{code:04x}" for code in _HOSTILE if code >= 0x7F}


class Sanitizer:
    """Streams text for a terminal. A carriage return before a newline is dropped, also when the two come apart."""

    def __init__(self) -> None:
        self._return = False

    def push(self, text: str) -> str:
        """The visible form of `text`; a final carriage return waits for what follows."""
        if not text:
            return ""
        if self._return:
            text = "\r" + text
        self._return = text.endswith("\r")
        if self._return:
            text = text[:-1]
        return text.replace("\r\n", "\n").translate(_VISIBLE)

    def flush(self) -> str:
        """What still waits."""
        waiting, self._return = self._return, False
        return _VISIBLE[0x0D] if waiting else ""


def visible(text: str) -> str:
    """Foreign text (a file name, a tensor name, an answer) with every control character shown; newline and tab stay."""
    return text.replace("\r\n", "\n").translate(_VISIBLE)


def one_line(text: str) -> str:
    """As `visible`, and newlines and tabs are shown too: for messages of one line."""
    return text.translate(_ONE_LINE)


def json_safe(text: str) -> str:
    """A JSON document whose strings hold no raw C1, bidi or surrogate code point; its meaning is the same."""
    return text.translate(_JSON | {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)})

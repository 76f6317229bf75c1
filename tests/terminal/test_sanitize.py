"""No foreign text can steer a terminal, however it is cut into tokens."""

import unicodedata

import pyte
from hypothesis import example, given
from hypothesis import strategies as st

from kvrun.terminal.sanitize import Sanitizer, json_safe, one_line, visible

HOSTILE = ["\x1b]52;c;cm0gLXJm\x07", "\x1b[2J\x1b[H", "\x9b31m", "\x1b]8;;http://x\x1b\\click\x1b]8;;\x1b\\", "\x1bP0;0|41/41\x1b\\",
           "\u202etxt.exe", "\u2066a\u2069", "\x08\x08", "\x7f", "\x85", "\u2028", "\r", "\x00", "\x0e", "\ufff9"]
# What a model may print: any text, more often than chance something hostile.
foreign = st.lists(st.one_of(st.text(), st.sampled_from(HOSTILE), st.just("\r\n"))).map("".join)


def harmless(text: str) -> bool:
    return all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") for c in text) and not any(
        "\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069" or c in "\u2028\u2029" for c in text)


def streamed(pieces: list[str]) -> str:
    sanitizer = Sanitizer()
    return "".join(sanitizer.push(piece) for piece in pieces) + sanitizer.flush()


@given(foreign, st.data())
@example("a\r\nb", None)
def test_any_split_gives_the_same_harmless_text(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text))))) if data else [2]
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert streamed(pieces) == visible(text)
    assert harmless(visible(text))


@given(foreign)
def test_a_terminal_shows_the_text_and_stays_where_it_would_be(text):
    """The cursor ends where the printed characters put it, and no mode, colour or title has changed."""
    columns = 400
    screen = pyte.Screen(columns, 5)
    stream = pyte.Stream(screen)
    modes = set(screen.mode)
    line = visible(text.replace("\n", " ").replace("\t", " "))[: columns // 2]
    stream.feed(line)
    assert screen.cursor.y == 0 and screen.title == "" and set(screen.mode) == modes
    assert screen.cursor.attrs == screen.default_char
    for hostile in ("\x1b", "\x9b"):
        assert hostile not in screen.display[0]


def test_each_hostile_sequence_is_shown():
    assert visible("\x1b[2J") == "\\x1b[2J"
    assert visible("a\x9b31mb") == "a\\x9b31mb"
    assert visible("\u202etxt") == "\\u202etxt"
    assert visible("a\rb") == "a\\x0db"
    assert visible("tab\tand\nnewline\r\n") == "tab\tand\nnewline\n"
    assert visible("\ud800") == "\ufffd"
    assert one_line("a\nb\tc") == "a\\nb\\tc"


def test_ordinary_text_of_many_scripts_is_untouched():
    text = "Grüße, 世界 🌍 עברית العربية हिन्दी 👩‍👩‍👧 [bold]x[/bold] \\x1b é"
    assert visible(text) == text == streamed(list(text))


@given(foreign)
def test_json_keeps_its_meaning(text):
    import json

    document = json.dumps({"text": text}, ensure_ascii=False)
    safe = json_safe(document)
    assert json.loads(safe) == json.loads(document)
    assert harmless(safe)

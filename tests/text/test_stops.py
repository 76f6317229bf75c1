"""Stop strings against a search in the whole text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvrun.text.stops import StopStrings

_TEXT = st.text("ab<\n", max_size=40)
_STOPS = st.lists(st.text("ab<\n", max_size=5), max_size=4)


def _pieces(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[a:b] for a, b in zip(bounds, bounds[1:])]


@settings(max_examples=500)
@given(_TEXT, _STOPS, st.lists(st.integers(0, 100), max_size=12))
def test_any_split_stops_where_the_whole_text_does(text, stops, cuts):
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s and s in text]
    watcher, shown, stopped = StopStrings(stops), "", False
    for piece in _pieces(text, cuts):
        safe, stopped = watcher.push(piece)
        shown += safe
        if stopped:
            break
    if ends:
        assert stopped and shown == text[:min(ends)[1]]
        assert watcher.found == max((s for s in stops if s and text[:min(ends)[0]].endswith(s)), key=len)
        assert watcher.push("more") == ("", True) and watcher.flush() == ""
    else:
        assert not stopped and shown + watcher.flush() == text


@settings(max_examples=300)
@given(_TEXT, _STOPS)
def test_holds_back_only_what_could_begin_a_stop_string(text, stops):
    watcher, shown = StopStrings(stops), ""
    for at, char in enumerate(text):
        safe, stopped = watcher.push(char)
        if stopped:
            return
        shown += safe
        held = text[len(shown):at + 1]
        assert held == "" or any(s.startswith(held) for s in stops)


def test_without_stop_strings_everything_passes():
    watcher = StopStrings([""])
    assert watcher.push("anything") == ("anything", False)
    assert watcher.flush() == ""

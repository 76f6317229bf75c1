"""What is remembered of ids that the cache has let go of."""

from kvrun.engine.history import DRAWN_ROWS, History, stretch


def test_kinds_are_those_of_what_begins_alike():
    history = History()
    history.note(0, [1, 2, 3], drawn=False)
    history.note(3, [4, 5], drawn=True)
    assert history.kinds([1, 2, 3, 4, 5, 6]) == b"\0\0\0\1\1"
    assert history.kinds([1, 2, 9, 4]) == b"\0\0" and history.kinds([]) == b""


def test_reading_the_same_again_forgets_nothing_behind_it():
    history = History()
    history.note(0, [1, 2], drawn=False)
    history.note(2, [3, 4], drawn=True)
    history.note(0, [1], drawn=False)
    assert history.kinds([1, 2, 3, 4]) == b"\0\0\1\1"
    history.note(2, [3], drawn=False)      # computed by the other arithmetic: what lay behind it is void
    assert history.kinds([1, 2, 3, 4]) == b"\0\0\0"
    history.note(1, [7], drawn=True)
    assert (history.ids, history.drawn) == ([1, 7], b"\0\1")


def test_stretches_cover_a_prompt_in_order():
    kinds = b"\0" * 5 + b"\1" * (DRAWN_ROWS + 3) + b"\0" * 2 + b"\1"
    found, start, end = [], 0, len(kinds) + 10
    while start < end:
        n, drawn = stretch(kinds, start, end)
        found.append((n, drawn))
        start += n
    assert found == [(5, False), (DRAWN_ROWS, True), (3, True), (2, False), (1, True), (10, False)]
    assert stretch(b"\0" * 5, 2, 30) == (28, False)

"""Policies: what a full context gives up, as integers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrun.cache.evict import POLICIES, pinned_tokens, spans, strided, window
from kvrun.cache.formats import PAGE
from kvrun.errors import UsageError

NUMBERS = st.lists(st.integers(0, 300), unique=True, min_size=1, max_size=40).map(sorted)


def pages(*numbers: int) -> list[int]:
    return [PAGE * n for n in numbers]


@given(st.sampled_from(sorted(POLICIES)), NUMBERS, st.integers(0, 50), st.integers(0, 50), st.lists(st.integers(0, 40000)))
def test_what_every_policy_keeps(name, numbers, pinned, need, turns):
    bases = pages(*numbers)
    dropped = POLICIES[name](bases, pinned, need, sorted(turns))
    assert dropped == sorted(set(dropped)) and set(dropped) <= set(bases[pinned:-1])
    assert len(dropped) >= min(need, len(bases[pinned:-1]))
    if need == 0:
        assert dropped == []
    if len(dropped) > need:
        assert name == "window" and len(dropped) <= len(bases[pinned:-1]) // 2


def test_window_drops_the_oldest():
    assert window(pages(0, 1, 2, 3, 4, 5), 1, 2, []) == pages(1, 2)
    assert window(pages(0, 4, 5, 6), 1, 1, [0, 10]) == pages(4)


def test_window_drops_turns_as_a_whole_as_far_as_pages_allow():
    bases = pages(*range(9))
    turn_of = [0, 3 * PAGE + 40, 7 * PAGE]          # turns begin in the middle of page 3, and with page 7
    assert window(bases, 1, 1, turn_of) == pages(1, 2)
    assert window(bases, 1, 2, turn_of) == pages(1, 2)
    # the rest of the second turn, pages 3 to 6, is more than half of what may go: one page at a time
    assert window(pages(0, 3, 4, 5, 6, 7, 8), 1, 1, turn_of) == pages(3)
    assert window(pages(0, *range(3, 14)), 1, 1, turn_of) == pages(3, 4, 5, 6)


def test_strided_keeps_the_newer_half_and_ever_fewer_of_the_older():
    bases = pages(0)
    for number in range(1, 400):
        bases.append(PAGE * number)
        if len(bases) > 21:
            gone = strided(bases, 1, 1, [])
            assert len(gone) == 1
            bases.remove(gone[0])
    held = [base // PAGE for base in bases]
    assert held[0] == 0 and held[-10:] == list(range(390, 400))
    older = held[1:-10]
    assert older[0] <= 64 and len(older) == 10
    steps = [b - a for a, b in zip(older, older[1:])]
    assert max(steps) <= 64 and all(n % 8 == 0 for n in older[:-2]), held


def test_kept_tokens_are_whole_pages_and_leave_two():
    assert [pinned_tokens(keep, 1024) for keep in (0, 1, 128, 129, 768)] == [128, 128, 128, 256, 768]
    with pytest.raises(UsageError, match=r"--keep 769 .*--n-ctx 1024: at most 768 "):
        pinned_tokens(769, 1024)
    with pytest.raises(UsageError, match="--keep 2000 .*at most 768 "):
        pinned_tokens(2000, 1100)
    with pytest.raises(UsageError, match="--n-ctx 384 or more"):
        pinned_tokens(0, 383)
    assert pinned_tokens(0, 384) == 128


def test_spans():
    assert spans([]) == ()
    assert spans([0, 128, 512], 128) == ((0, 256), (512, 640))
    assert spans([3, 4, 6]) == ((3, 5), (6, 7))

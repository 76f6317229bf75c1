"""Page bookkeeping: every page owned once, windows keep what the next row sees, errors change nothing."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrun.backends.plan import CacheGroup
from kvrun.cache.evict import POLICIES, pinned_tokens, window
from kvrun.cache.formats import PAGE
from kvrun.cache.pages import FreeList, Sequence, pages_needed
from kvrun.errors import ContextFullError


def make(n_ctx: int, chunk: int, windows: list[int]) -> tuple[Sequence, list[FreeList], list[CacheGroup]]:
    groups = [CacheGroup(w, (i,), 1, 64) for i, w in enumerate(windows)]
    free = [FreeList(pages_needed(g, n_ctx, chunk)) for g in groups]
    return Sequence(tuple(groups), free, n_ctx), free, groups


def check(seq: Sequence, free: list[FreeList], groups: list[CacheGroup], rows: int) -> None:
    """The invariants after a step of `rows` rows that end at seq.length."""
    first = seq.length - rows
    for table, f, group in zip(seq.tables(), free, groups, strict=True):
        assert len(set(table.pages)) == len(table.pages)
        assert len(table.pages) + len(f) == f.n_pages
        assert all(b % PAGE == 0 for b in table.base)
        assert list(table.base) == sorted(set(table.base))
        lowest = max(0, first - group.window + 1) if group.window else 0
        held = {p for b in table.base for p in range(b, b + PAGE)}
        assert held >= set(range(lowest, seq.length)), "a visible position has no page"


@given(st.integers(0, 2**32), st.integers(1, 1500), st.integers(1, 600),
       st.lists(st.sampled_from([0, 1, 100, 128, 129, 512]), min_size=1, max_size=3))
def test_random_lives(seed: int, n_ctx: int, chunk: int, windows: list[int]) -> None:
    rng = random.Random(seed)
    seq, free, groups = make(n_ctx, chunk, windows)
    for _ in range(30):
        if rng.random() < 0.7:
            rows = rng.choice([1, rng.randint(1, chunk)])
            before = [(list(t.pages), list(t.base)) for t in seq.tables()]
            try:
                seq.extend(rows)
            except ContextFullError:
                assert seq.length + rows > n_ctx, "the planned pages must always suffice"
                assert before == [(list(t.pages), list(t.base)) for t in seq.tables()]
                continue
            check(seq, free, groups, rows)
        else:
            n = rng.randint(0, seq.length)
            if seq.truncate(n):
                assert seq.length == n
                for table in seq.tables():
                    assert all(b < n for b in table.base)
            else:
                assert any(windows) and n > 0
    seq.clear()
    assert all(len(f) == f.n_pages for f in free)


@given(st.integers(0, 2**32), st.lists(st.sampled_from([0, 40, 128, 500]), min_size=1, max_size=2))
def test_lives_of_whole_pages(seed: int, windows: list[int]) -> None:
    """No step spans two pages; a rewind keeps everything or ends at a page border, at most a page below."""
    rng = random.Random(seed)
    groups = tuple(CacheGroup(w, (i,), 1, 64) for i, w in enumerate(windows))
    seq = Sequence(groups, [FreeList(pages_needed(g, 1000, PAGE)) for g in groups], 1000, whole_pages=True)
    for _ in range(40):
        if rng.random() < 0.8 and seq.length < 1000:
            rows = seq.most_rows(min(rng.choice([1, rng.randint(1, 300)]), 1000 - seq.length))
            before = seq.length
            seq.extend(rows)
            assert rows >= 1 and before // PAGE == (seq.length - 1) // PAGE
        else:
            before, n = seq.length, rng.randint(0, seq.length)
            if seq.truncate(n):
                assert seq.length == (n if n == before else n - n % PAGE)
                assert all(b < seq.length for table in seq.tables() for b in table.base)
            else:
                assert seq.length == before and any(windows)


def test_steps_of_other_caches_are_not_cut() -> None:
    seq, _, _ = make(4096, 512, [0])
    seq.extend(100)
    assert seq.most_rows(512) == 512


def test_full_group_takes_all_pages_and_then_stops() -> None:
    seq, free, _ = make(300, 64, [0])
    assert free[0].n_pages == 3
    seq.extend(300)
    assert len(free[0]) == 0
    with pytest.raises(ContextFullError, match="301 tokens.*300"):
        seq.extend(1)
    assert seq.length == 300


def test_sliding_group_owns_only_its_window() -> None:
    seq, free, groups = make(32768, 512, [512, 0])
    assert free[0].n_pages == (512 + 512) // PAGE + 1
    for _ in range(32768 // 512):
        seq.extend(512)
        check(seq, free, groups, 512)


def test_short_rewind_of_a_sliding_group_needs_no_prefill() -> None:
    seq, _, _ = make(8192, 512, [512])
    for _ in range(4):
        seq.extend(512)
    for _ in range(300):
        seq.extend(1)
    assert seq.truncate(2200)
    assert not seq.truncate(10)
    assert seq.length == 2200


POLICY = st.sampled_from(sorted(POLICIES))


@given(st.integers(0, 2**32), st.integers(3 * PAGE, 3000), st.integers(1, 600), POLICY,
       st.lists(st.sampled_from([0, 1, 100, 128, 129, 512, 1500]), min_size=1, max_size=3))
def test_random_lives_with_eviction(seed: int, n_ctx: int, chunk: int, policy: str, windows: list[int]) -> None:
    rng = random.Random(seed)
    chunk = min(chunk, n_ctx)
    seq, free, groups = make(n_ctx, chunk, windows)
    keep = pinned_tokens(rng.randint(0, n_ctx - 3 * PAGE), n_ctx)
    seq.evict_with(POLICIES[policy], keep)
    evicted: set[int] = set()                       # what was told
    rewound = False
    for _ in range(80):
        if rng.random() < 0.1:
            seq.begin_turn()
        if rng.random() < 0.85:
            rows = seq.most_rows(rng.choice([1, rng.randint(1, chunk), chunk]))
            assert rows > 0
            first = seq.length
            now = seq.extend(rows)                  # there is always room
            assert not set(now) & evicted and all(keep <= base < first - first % PAGE for base in now)
            evicted |= set(now)
            check_with_holes(seq, free, groups, first, evicted, keep, chunk, rewound)
        else:
            n = seq.length - min(seq.length, rng.choice([0, 1, rng.randint(0, 400), rng.randint(0, seq.length)]))
            before = [(list(t.pages), list(t.base)) for t in seq.tables()]
            if seq.truncate(n):
                rewound = True
                assert seq.length == n and not n or (n - 1) // PAGE * PAGE not in evicted
                evicted = {base for base in evicted if base < n}
                assert all(b < n for t in seq.tables() for b in t.base)
                if n:
                    check_with_holes(seq, free, groups, n, evicted, keep, chunk, rewound)
            else:
                assert n > 0 and before == [(list(t.pages), list(t.base)) for t in seq.tables()]
    seq.clear()
    assert all(len(f) == f.n_pages for f in free) and seq.held == 0


def check_with_holes(seq: Sequence, free: list[FreeList], groups: list[CacheGroup], first: int, evicted: set[int],
                     keep: int, chunk: int, rewound: bool) -> None:
    """The invariants of a step whose rows begin at `first`: as in `check`, but for what was told to be evicted."""
    for table, f, group in zip(seq.tables(), free, groups, strict=True):
        assert sorted([*table.pages, *f._free]) == list(range(f.n_pages)), "every page is owned once"
        assert list(table.base) == sorted(set(table.base)) and all(b % PAGE == 0 for b in table.base)
        lowest = max(0, first - group.window + 1) if group.window else 0
        seen = set(range(lowest // PAGE * PAGE, seq.length, PAGE))
        assert seen - set(table.base) <= evicted, "a page is missing that nobody was told of"
        if not group.window:
            assert not set(table.base) & evicted
            assert set(range(0, min(keep, seq.length), PAGE)) <= set(table.base), "the first pages stay"
            assert seq.held == seq.length - PAGE * len(evicted) <= seq.n_ctx
            assert seq.lost_before(seq.length) == PAGE * len(evicted)
            assert (seq.length - 1) // PAGE * PAGE in table.base
            assert first % PAGE == 0 or first < PAGE or (first - 1) // PAGE * PAGE in table.base
        elif not rewound and f.n_pages == pages_needed(group, 10**9, chunk):
            assert seen <= set(table.base), "a window that has its pages loses none"


@pytest.mark.parametrize("windows", [[0], [512, 0], [512]])
def test_a_life_of_many_contexts(windows: list[int]) -> None:
    """What is held stays bounded and full; nothing is taken but the pages of the start."""
    seq, free, groups = make(1024, 256, windows)
    seq.evict_with(window, PAGE)
    for _ in range(100 * 1024):
        seq.extend(1)
    assert seq.length == 102400
    if 0 in windows:
        assert 1024 - PAGE < seq.held <= 1024
        assert list(seq.tables()[windows.index(0)].base) == [0, *range(102400 - 7 * PAGE, 102400, PAGE)]
    assert all(len(t.pages) + len(f) == f.n_pages for t, f in zip(seq.tables(), free, strict=True))


def test_no_rewind_into_a_hole() -> None:
    seq, _, _ = make(1024, 256, [0])
    seq.evict_with(window, PAGE)
    for _ in range(8):
        seq.extend(256)
    assert list(seq.tables()[0].base)[:2] == [0, 1152]
    assert not seq.truncate(1152) and not seq.truncate(129)
    assert seq.lost_before(1200) == 1024
    assert seq.truncate(1153) and seq.truncate(128) and seq.lost_before(128) == 0

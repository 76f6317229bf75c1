"""attend over pages in any order, with holes and rubbish behind the newest token, against numpy in float64."""

import numpy as np
import pytest

from .plans import GRANTED, PAGE, Cache, Machine, floats, loaded, pointer, poisoned, rms_error, stored

TILED = {"bf16": 2e-5, "f16": 4e-5}
"""Cache formats whose prompts have a kernel of their own where the CPU has tiles, and its tolerance: products of a query's or
probability's remainder (up to 2^-9 of it) with that of a float16 are left out."""


class Sequence:
    """Random K and V of the positions that are held, laid out in pages of random numbers."""

    def __init__(self, rng, cache, length, free_pages, holes=()):
        self.length = length
        self.bases = [b for b in range(0, length, PAGE) if b // PAGE not in holes]
        self.pages = [free_pages.pop() for _ in self.bases]
        self.k, self.v = (np.zeros((cache.kv_heads, length, cache.head_dim)) for _ in "kv")
        self.held = np.zeros(length, dtype=bool)
        for page, base in zip(self.pages, self.bases, strict=True):
            n = min(PAGE, length - base)
            self.held[base : base + n] = True
            for h in range(cache.kv_heads):
                for which, into, dtype in (("k", self.k, cache.k_dtype), ("v", self.v, cache.v_dtype)):
                    values = floats(rng, n, cache.head_dim)
                    cache.put(page, h, which, 0, values)
                    into[h, base : base + n] = loaded(stored(values, dtype), dtype)

    @property
    def table(self):
        return self.pages, self.bases

    def expected(self, q, pos, group, scale, window, softcap, sinks):
        """q [heads][D] at position pos -> [heads][D]."""
        p = np.arange(self.length)
        seen = self.held & (p <= pos) & ((pos - p < window) if window else True)
        out = np.empty(q.shape)
        for h in range(len(q)):
            s = scale * (self.k[h // group][seen] @ q[h].astype(np.float64))
            if softcap:
                s = softcap * np.tanh(s / softcap)
            top = max(s.max(), sinks[h] if sinks is not None else -np.inf)
            e = np.exp(s - top)
            out[h] = e @ self.v[h // group][seen] / (e.sum() + (np.exp(sinks[h] - top) if sinks is not None else 0))
        return out


def attend(machine, cache, qkv, heads, positions, tables, *, seq=None, prefill=False, window=0, scale=0.125, softcap=0.0, sinks=None):
    rows = len(positions)
    out = poisoned(rows + 1, heads * cache.head_dim)
    op = {"qkv": pointer(qkv), "out": pointer(out), "sinks": pointer(sinks), "cache": cache.fields(), "heads": heads,
          "kv_heads": cache.kv_heads, "head_dim": cache.head_dim, "window": window, "scale": scale, "softcap": softcap}
    machine.run([("attend", op)], pos=positions, seq=seq, tables=[tables], prefill=prefill)
    assert np.isnan(out[rows:]).all()
    return out[:rows].reshape(rows, heads, cache.head_dim)


def check(machine, rng, *, head_dim, group, kv_heads=2, length=300, rows=1, window=0, softcap=0.0, sinks=False, dtypes=("bf16", "bf16"),
          prefill=False, holes=(), tolerance=2e-5, rms=None):
    heads = group * kv_heads
    pages = list(rng.permutation(length // PAGE + 4))
    cache = Cache(len(pages), kv_heads, head_dim, *dtypes)
    sequence = Sequence(rng, cache, length, pages, holes)
    positions = range(length - rows, length)
    qkv = floats(rng, rows, (heads + 2 * kv_heads) * head_dim) * 2
    qkv[:, heads * head_dim :] = np.nan                          # the k and v parts are nobody's business
    sink = floats(rng, heads) * 3 if sinks else None
    scale = float(head_dim**-0.5)
    out = attend(machine, cache, qkv, heads, positions, [sequence.table], prefill=prefill, window=window, scale=scale, softcap=softcap, sinks=sink)
    wanted = [sequence.expected(qkv[row, : heads * head_dim].reshape(heads, head_dim), pos, group, scale, window, softcap, sink)
              for row, pos in enumerate(positions)]
    for row, want in enumerate(wanted):
        np.testing.assert_allclose(out[row], want, rtol=tolerance, atol=tolerance)
    assert rms is None or rms_error(out, np.stack(wanted)) <= rms


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256, 50, 2])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_shapes(machine, rng, head_dim, group):
    check(machine, rng, head_dim=head_dim, group=group)
    for dtype in TILED:
        check(machine, rng, head_dim=head_dim, group=group, rows=20, length=150, prefill=True, dtypes=(dtype, dtype), tolerance=TILED[dtype])


@pytest.mark.parametrize("window", [0, 1, 100, 128, 512])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 300, 1000])
def test_lengths_and_windows(machine, rng, length, window):
    check(machine, rng, head_dim=64, group=3, length=length, window=window)
    for dtype in TILED:
        check(machine, rng, head_dim=64, group=3, length=length, window=window, rows=min(length, 37), prefill=True, dtypes=(dtype, dtype),
              tolerance=TILED[dtype])


@pytest.mark.parametrize("k_dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("v_dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("length", [6, 131])
def test_formats(machine, rng, k_dtype, v_dtype, length):
    for head_dim in (64, 40):
        check(machine, rng, head_dim=head_dim, group=4, dtypes=(k_dtype, v_dtype), length=length)
        check(machine, rng, head_dim=head_dim, group=4, dtypes=(k_dtype, v_dtype), length=length, rows=6, prefill=True,
              tolerance=4e-5 if k_dtype == v_dtype == "f16" else 2e-5)


@pytest.mark.parametrize("group", [1, 2, 5, 6, 7, 9, 10, 11, 12, 13, 16, 60])
def test_any_group(machine, rng, group):
    check(machine, rng, head_dim=32, group=group, kv_heads=1)
    check(machine, rng, head_dim=32, group=group, kv_heads=1, rows=9, prefill=True)


@pytest.mark.parametrize("prefill", [False, True])
def test_softcap_and_sinks(machine, rng, prefill):
    for softcap, sinks in ((2.0, False), (0.0, True), (30.0, True)):
        check(machine, rng, head_dim=64, group=2, softcap=softcap, sinks=sinks, rows=5, prefill=prefill)


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("window", [0, 700])
@pytest.mark.parametrize("dtype", TILED)
def test_holes(machine, rng, prefill, window, dtype):
    check(machine, rng, head_dim=64, group=3, length=1500, holes=(0, 2, 3, 4, 8), window=window, rows=3, prefill=prefill, dtypes=(dtype, dtype),
          tolerance=TILED[dtype])


@pytest.mark.parametrize("isa", GRANTED)
@pytest.mark.parametrize("window", [0, 100, 512])
@pytest.mark.parametrize("dtype", TILED)
def test_a_row_does_not_depend_on_its_company(isa, rng, window, dtype):
    """Bit-identical whatever the chunk size, the number of rows, the threads, and pages that left the window."""
    heads, kv_heads, head_dim, length = 6, 2, 64, 700
    pages = list(rng.permutation(16))
    cache = Cache(16, kv_heads, head_dim, dtype, dtype)
    sequence = Sequence(rng, cache, length, pages)
    qkv = floats(rng, length, (heads + 2 * kv_heads) * head_dim)
    settings = {"window": window, "scale": 0.2}
    whole = {}
    for threads in (1, 2, 3):
        with Machine(isa, threads) as machine:
            for prefill in (True, False):
                out = attend(machine, cache, qkv, heads, range(length), [sequence.table], prefill=prefill, **settings)
                assert (whole.setdefault(prefill, out) == out).all(), f"{threads} threads"
    with Machine(isa, 2) as machine:
        for prefill in (True, False):
            for size in (1, 7, 64, 513):
                starts = range(0, length, size) if size > 1 else rng.choice(length, 12, replace=False)
                for start in starts:
                    stop = min(length, int(start) + size)
                    out = attend(machine, cache, qkv[start:stop], heads, range(start, stop), [sequence.table], prefill=prefill, **settings)
                    assert (out == whole[prefill][start:stop]).all(), f"chunks of {size}"
        if window:
            oldest = max(0, length - window) // PAGE
            for prefill in (True, False):
                table = (sequence.pages[oldest:], sequence.bases[oldest:])
                out = attend(machine, cache, qkv[-1:], heads, [length - 1], [table], prefill=prefill, **settings)
                assert (out == whole[prefill][-1:]).all()


@pytest.mark.parametrize("prefill", [False, True])
def test_several_sequences(machine, rng, prefill):
    kv_heads, group, head_dim = 2, 2, 64
    heads = kv_heads * group
    pages = list(rng.permutation(20))
    cache = Cache(20, kv_heads, head_dim)
    sequences = [Sequence(rng, cache, length, pages) for length in (5, 129, 400, 260)]
    seq = np.repeat(np.arange(4), [2, 30, 3, 40])
    positions = np.concatenate([np.arange(s.length - n, s.length) for s, n in zip(sequences, [2, 30, 3, 40], strict=True)])
    qkv = floats(rng, len(seq), (heads + 2 * kv_heads) * head_dim)
    out = attend(machine, cache, qkv, heads, positions, [s.table for s in sequences], seq=seq, prefill=prefill)
    for row, (s, pos) in enumerate(zip(seq, positions, strict=True)):
        want = sequences[s].expected(qkv[row, : heads * head_dim].reshape(heads, head_dim), pos, group, 0.125, 0, 0.0, None)
        np.testing.assert_allclose(out[row], want, rtol=2e-5, atol=2e-5)


def test_many_decode_rows_fit_the_scratch(machine, rng):
    """More part results than one batch may hold."""
    kv_heads, head_dim, rows, length = 8, 256, 100, 1030
    cache = Cache(9, kv_heads, head_dim)
    sequence = Sequence(rng, cache, length, list(range(9)))
    qkv = floats(rng, rows, 3 * kv_heads * head_dim)
    together = attend(machine, cache, qkv, kv_heads, range(length - rows, length), [sequence.table])
    for row in (0, 41, rows - 1):
        alone = attend(machine, cache, qkv[row : row + 1], kv_heads, [length - rows + row], [sequence.table])
        assert (alone[0] == together[row]).all()


def test_large_scores_do_not_overflow(machine, rng):
    cache = Cache(3, 1, 64, "f32", "f32")
    sequence = Sequence(rng, cache, 300, [2, 0, 1])
    qkv = floats(rng, 1, 3 * 64) * 1000
    out = attend(machine, cache, qkv, 1, [299], [sequence.table], scale=1.0)
    want = sequence.expected(qkv[:, :64], 299, 1, 1.0, 0, 0.0, None)
    np.testing.assert_allclose(out[0], want, rtol=5e-3, atol=5e-3)   # scores near 10^4 are off by 1e-3 in float32


def test_nan_in_k_reaches_the_result(machine, rng):
    cache = Cache(1, 1, 64)
    sequence = Sequence(rng, cache, 20, [0])
    cache.put(0, 0, "k", 7, np.full((1, 64), np.nan, np.float32))
    for prefill in (False, True):
        out = attend(machine, cache, floats(rng, 1, 3 * 64), 1, [19], [sequence.table], prefill=prefill)
        assert np.isnan(out).all()

"""Q8 and Q4 cache pages: what append stores, to the bit, and what attend makes of them, against numpy in float64."""

import numpy as np
import pytest

from kvrun.backends.native import DTYPES, lib

from .plans import GRANTED, PAGE, Machine, floats, pointer, rms_error
from .quant_cache import SINKS, QuantCache, Rows, attend, chunks

PAIRS = [("q8", "q8"), ("q4", "q4"), ("q8", "q4"), ("q4", "q8"), ("bf16", "q4"), ("q8", "f16"), ("q4", "bf16")]
DIMS = [16, 48, 64, 80, 96, 128, 192, 256]
ids = "/".join


def some_rows(rng, n, heads, kv_heads, d):
    """Rows with a few channels and a few tokens far larger than the others, as real K has them."""
    x = floats(rng, n, heads + 2 * kv_heads, d)
    x *= np.exp(rng.standard_normal((1, heads + 2 * kv_heads, d))).astype(np.float32)
    x[:3] *= 10
    return x.reshape(n, -1)


def filled(machine, rng, dtypes, *, length, d=64, group=3, kv_heads=2, qkv=None, start=0, size=50):
    heads = group * kv_heads
    pages = list(rng.permutation(length // PAGE + 4))
    cache = QuantCache(len(pages), kv_heads, d, *dtypes)
    rows = Rows(cache, some_rows(rng, length, heads, kv_heads, d) if qkv is None else qkv, heads, pages, start=start)
    for positions in chunks(start, rows.length, size):
        rows.append(machine, positions)
    return rows


def check_pages(rows):
    cache, d = rows.cache, rows.cache.head_dim
    for i, page in enumerate(rows.pages):
        n = min(PAGE, rows.length - rows.bases[i])
        for head in range(cache.kv_heads):
            for which, dtype in cache.dtypes.items():
                if dtype not in ("q8", "q4"):
                    continue
                got = cache.head(page, head, which)
                if dtype == "q4" and n < PAGE:
                    assert (got == 0xFF).all()             # untouched until its last slot is filled
                    continue
                want, where = rows.expected_page(i, head, which), f"{which} {dtype} page {i} head {head}"
                got = got.copy()
                if dtype == "q4" and rows.bases[i] == 0:   # codes of the first slots are unspecified
                    codes = (PAGE * d // 2)
                    for part in (got, want):
                        shape = part[:codes].reshape((d // 2, PAGE) if which == "k" else (PAGE, d // 2))
                        shape[(slice(None), slice(SINKS)) if which == "k" else slice(SINKS)] = 0
                np.testing.assert_array_equal(got, want, err_msg=where)


@pytest.mark.parametrize("dtypes", PAIRS[:2], ids=ids)
@pytest.mark.parametrize("d", DIMS)
def test_pages_to_the_bit(machine, rng, d, dtypes):
    check_pages(filled(machine, rng, dtypes, length=300, d=d, group=int(rng.integers(1, 5))))


KINDS = {
    "zero": lambda rng, n: np.zeros(n), "constant": lambda rng, n: np.full(n, 3.0), "huge": lambda rng, n: rng.standard_normal(n) * 1e30,
    "beyond_half": lambda rng, n: rng.standard_normal(n) * 1e6, "tiny": lambda rng, n: rng.standard_normal(n) * 1e-30,
    "subnormal": lambda rng, n: rng.standard_normal(n) * 1e-39, "near_half_zero": lambda rng, n: rng.standard_normal(n) * 10.0 ** rng.uniform(-8, -4),
    "signs": lambda rng, n: rng.choice([-1.0, 1.0, -0.0, 0.0], n), "one_large": lambda rng, n: np.where(rng.random(n) < 0.01, 1e4, 1e-4 * rng.standard_normal(n)),
    "small_whole": lambda rng, n: rng.integers(-3, 4, n), "wide": lambda rng, n: rng.standard_normal(n) * 10.0 ** rng.uniform(-20, 20, n),
}


@pytest.mark.parametrize("dtypes", PAIRS[:2], ids=ids)
@pytest.mark.parametrize("kind", KINDS)
def test_odd_values_to_the_bit(machine, rng, kind, dtypes):
    with np.errstate(all="ignore"):
        qkv = KINDS[kind](rng, 256 * 8 * 64).astype(np.float32).reshape(256, -1)
        rows = filled(machine, rng, dtypes, length=256, d=64, group=2, kv_heads=2, qkv=qkv)
        check_pages(rows)


@pytest.mark.parametrize("dtypes", PAIRS[:2], ids=ids)
def test_not_a_number_stays_visible(machine, rng, dtypes):
    for bad in (np.nan, np.inf, -np.inf):
        qkv = some_rows(rng, 200, 2, 1, 64)
        qkv[77, 2 * 64 + 5] = bad
        rows = filled(machine, rng, dtypes, length=200, group=2, kv_heads=1, qkv=qkv)
        check_pages(rows)
        q = floats(rng, 1, 2, 64)
        for prefill in (False, True):
            assert np.isnan(attend(machine, rows, q, [199], prefill=prefill, scale=0.1)).all()


def compare(machine, rng, rows, positions, *, prefill, tolerance=2e-5, rms=None, **settings):
    d = rows.cache.head_dim
    scale = float(d**-0.5) / 4
    q = floats(rng, len(positions), rows.heads, d) * 2
    if machine.isa == "amx":  # a query is integers of 16 bits there: what one rounding of its largest channel moves a score by
        tolerance += 2**-16 * scale * np.linalg.norm(q, axis=2).max() * np.abs(rows.k).max() * d**0.5
    got = attend(machine, rows, q, positions, prefill=prefill, scale=scale, **settings)
    held = settings.pop("table", (0, None))[1]
    wanted = [rows.expected(q[i], pos, scale, held=held, **settings) for i, pos in enumerate(positions)]
    for i, (pos, want) in enumerate(zip(positions, wanted, strict=True)):
        np.testing.assert_allclose(got[i], want, rtol=tolerance, atol=tolerance * max(1, np.abs(want).max()), err_msg=f"pos {pos}")
    assert rms is None or rms_error(got.reshape(len(wanted), -1), np.stack(wanted).reshape(len(wanted), -1)) <= rms


def last_rows(rows, n):
    return range(max(rows.start, (rows.length - 1) // PAGE * PAGE, rows.length - n), rows.length)


@pytest.mark.parametrize("dtypes", PAIRS, ids=ids)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128, 129, 300])
def test_lengths(machine, rng, length, dtypes):
    rows = filled(machine, rng, dtypes, length=length)
    compare(machine, rng, rows, last_rows(rows, 1), prefill=False)
    compare(machine, rng, rows, last_rows(rows, 37), prefill=True)


@pytest.mark.parametrize("dtypes", PAIRS[:4], ids=ids)
@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_shapes(machine, rng, d, group, dtypes):
    rows = filled(machine, rng, dtypes, length=270, d=d, group=group, kv_heads=2, size=128)
    compare(machine, rng, rows, last_rows(rows, 2), prefill=False)
    compare(machine, rng, rows, last_rows(rows, 9), prefill=True)


@pytest.mark.parametrize("dtypes", PAIRS[:4], ids=ids)
@pytest.mark.parametrize("window", [1, 100, 128, 200, 512])
def test_windows(machine, rng, window, dtypes):
    rows = filled(machine, rng, dtypes, length=390, size=128)
    for prefill in (False, True):
        compare(machine, rng, rows, last_rows(rows, 5), prefill=prefill, window=window)


@pytest.mark.parametrize("dtypes", PAIRS[:2], ids=ids)
@pytest.mark.parametrize("prefill", [False, True])
def test_softcap_sinks_and_holes(machine, rng, prefill, dtypes):
    rows = filled(machine, rng, dtypes, length=900, size=128)
    sinks = floats(rng, rows.heads) * 3
    pages, bases, side = rows.table
    for dropped in ((), (0,), (1, 2, 4), (0, 1, 3, 5)):
        held = [i for i in range(len(pages)) if i not in dropped]
        table = [pages[i] for i in held], [bases[i] for i in held], side
        compare(machine, rng, rows, last_rows(rows, 3), prefill=prefill, softcap=2.0, sinks=sinks, table=table)


@pytest.mark.parametrize("dtypes", PAIRS[:2], ids=ids)
def test_sliding_pages_are_used_again(machine, rng, dtypes):
    """A sequence that owns three pages whatever its length, and a second one in the other side memory beside it."""
    kv_heads, group, d, window, length = 2, 2, 64, 130, 700
    heads = kv_heads * group
    cache = QuantCache(6, kv_heads, d, *dtypes, n_sides=2)
    both = []
    for side, own in enumerate(((0, 3, 5), (1, 2, 4))):
        rows = Rows(cache, some_rows(rng, length, heads, kv_heads, d), heads, [own[i % 3] for i in range(6)][::-1], side=side)
        both.append(rows)
    for positions in chunks(0, length, 60):
        for rows in both:
            first = max(0, positions[0] - window + 1) // PAGE
            last = positions[-1] // PAGE + 1
            table = rows.pages[first:last], rows.bases[first:last], rows.side
            data = rows.qkv[positions[0] : positions[-1] + 1].copy()
            op = {"qkv": pointer(data), "cache": cache.fields(), "heads": heads, "kv_heads": kv_heads, "head_dim": d}
            machine.run([("append", op)], pos=list(positions), tables=[[table]])
            compare(machine, rng, rows, positions[-1:], prefill=False, window=window, table=table)


@pytest.mark.parametrize("dtypes", PAIRS[:2], ids=ids)
def test_error_is_small(machine, rng, dtypes):
    """Against attention over the numbers before they were quantized."""
    n, d = 1000, 64
    heads, kv_heads = 4, 2
    qkv = floats(rng, n, (heads + 2 * kv_heads) * d)
    rows = filled(machine, rng, dtypes, length=n, d=d, group=2, kv_heads=kv_heads, qkv=qkv, size=128)
    exact = filled(machine, rng, ("bf16", "bf16"), length=n, d=d, group=2, kv_heads=kv_heads, qkv=qkv, size=128)
    q = floats(rng, 1, heads, d)
    got, want = (attend(machine, r, q, [n - 1], prefill=False, scale=0.125) for r in (rows, exact))
    error = np.sqrt(((got - want) ** 2).mean() / (want**2).mean())
    assert error < {"q8": 0.012, "q4": 0.2}[dtypes[0]]   # of 60 draws: q4 0.12 in the mean, 0.166 at most


@pytest.mark.parametrize("isa", GRANTED)
@pytest.mark.parametrize("dtypes", PAIRS[:4], ids=ids)
def test_a_row_does_not_depend_on_its_company(isa, rng, dtypes):
    """Bit-identical pages and results whatever the chunk size and the threads."""
    heads, kv_heads, d, length = 6, 2, 64, 400
    qkv = some_rows(rng, length, heads, kv_heads, d)
    q = floats(rng, length, heads, d)
    pages = list(rng.permutation(4))
    seen = {}
    for threads, size in ((1, 128), (2, 1), (2, 23), (3, 64)):
        with Machine(isa, threads) as machine:
            cache = QuantCache(4, kv_heads, d, *dtypes)
            rows = Rows(cache, qkv, heads, list(pages))
            for positions in chunks(0, length, size):
                rows.append(machine, positions)
                if size == 1 and positions[0] not in (0, 20, 127, 128, 200, 255, 256, 390):
                    continue
                for prefill in (False, True):
                    at = slice(positions[0], positions[-1] + 1)
                    out = attend(machine, rows, q[at], positions, prefill=prefill, scale=0.05, window=300)
                    for pos, row in zip(positions, out, strict=True):
                        assert (seen.setdefault((prefill, pos), row) == row).all(), f"{threads} threads, chunks of {size}, position {pos}"
            assert (seen.setdefault("memory", cache.memory) == cache.memory).all()


def test_rows_of_two_pages_are_refused(machine, rng):
    cache = QuantCache(2, 1, 64, "q4", "q8")
    rows = Rows(cache, some_rows(rng, 200, 2, 1, 64), 2, [1, 0])
    op = {"qkv": pointer(rows.qkv), "cache": cache.fields(), "heads": 2, "kv_heads": 1, "head_dim": 64}
    machine.run([("append", op)], pos=[127, 128], tables=[[rows.table]], status=lib.KV_BAD_PLAN)
    machine.run([("append", op)], pos=[127, 128], seq=[0, 1], tables=[[rows.table, (rows.pages, rows.bases, -1)]], status=lib.KV_BAD_PLAN)
    op["cache"]["side"] = pointer(None)
    machine.run([("append", op)], pos=[5], tables=[[rows.table]], status=lib.KV_BAD_PLAN)
    assert (cache.memory == 0xFF).all()


def test_page_and_side_bytes():
    from kvrun.cache.formats import page_head_bytes, side_bytes
    for d in DIMS:
        for dtype in ("q8", "q4", "bf16"):
            for is_v in (False, True):
                assert lib.kv_page_bytes(DTYPES[dtype], d, is_v) == page_head_bytes(dtype, d, is_v=is_v)
        for k, v in PAIRS:
            assert lib.kv_side_bytes(DTYPES[k], DTYPES[v], 3, d) == side_bytes(k, v, 3, d)
    assert [lib.kv_page_bytes(DTYPES[dtype], d, 1) for dtype, d in (("q8", 40), ("q4", 72), ("q4", 272), ("q8", 0))] == [-1] * 4

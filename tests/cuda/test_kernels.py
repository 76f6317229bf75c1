"""Every CUDA kernel against numpy in float64, through the checks of the CPU kernels' tests."""

import numpy as np
import pytest

from kvrun.backends.native import DTYPES, lib

from ..kernels import test_append as appending
from ..kernels import test_attend as attention
from ..kernels import test_quant_cache as quantized
from ..kernels import test_sample as sampling
from ..kernels.plans import PAGE, Cache, floats, pointer, poisoned
from ..kernels.test_linear import FORMATS, Matrix
from ..kernels.test_quant_cache import filled, last_rows

PLAIN = [("f32", "f32"), ("f16", "f16"), ("bf16", "bf16"), ("f16", "f32"), ("bf16", "f16")]
PAIRS = [("q8", "q8"), ("q4", "q4"), ("q8", "q4"), ("q4", "q8"), ("bf16", "q4"), ("q8", "f16"), ("q4", "bf16")]
ids = "/".join


def tolerance(prefill: bool, head_dim: int, *dtypes: str) -> tuple[float, float]:
    """Of attention, for the worst number and for the root mean square. Decode rows, and heads of more than 128 channels, have 22 bits
    of q and of probabilities, prompt rows 11; 16 and 8 where one of the two meets bfloat16, as in FlashAttention. A score of 50 is wrong
    by 50 units of the last of them, and its probability by as large a share: hence the worst. To a model it is little: over the first
    96 tokens of tests/data/alice.txt SmolLM2's prompt rows have a mean KL divergence of 5e-7 from the reference with halves (1e-7 with
    twice the bits) and 3e-5 with bfloat16 (7e-6). Heads that are no whole groups of channels, and float32, are computed in float32."""
    if head_dim % 32 or "f32" in dtypes:
        return 2e-5, 3e-6
    eight = "bf16" in dtypes or "q4" in dtypes              # a 4-bit cache keeps some pages in bfloat16
    if prefill and head_dim <= 128:
        return (0.3, 0.06) if eight else (0.05, 4e-3)
    return (2e-3, 1e-4) if eight else (1e-4, 1e-5)


def check(machine, rng, *, head_dim, dtypes=("bf16", "bf16"), prefill=False, **settings):
    worst, rms = tolerance(prefill, head_dim, *dtypes)
    attention.check(machine, rng, head_dim=head_dim, dtypes=dtypes, prefill=prefill, tolerance=worst, rms=rms, **settings)


def compare(machine, rng, rows, positions, *, prefill, **settings):
    worst, rms = tolerance(prefill, rows.cache.head_dim, *rows.cache.dtypes.values())
    quantized.compare(machine, rng, rows, positions, prefill=prefill, tolerance=worst, rms=rms, **settings)


# ---- linear, embed ----

def linear(machine, m, x, *, bias=None, scale=1.0, softcap=0.0, onto=None, n_out=None):
    """[rows][n], with guard rows that must stay NaN."""
    rows, n = len(x), m.weight.n
    out = poisoned(rows + 2, n)
    if onto is not None:
        out[:rows] = onto
    op = {"w": m.weight[0], "bias": pointer(bias), "x": pointer(x), "out": pointer(out), "scale": scale, "softcap": softcap,
          "rows": lib.KV_ROWS_ALL if n_out is None else lib.KV_ROWS_OUT, "accumulate": onto is not None}
    machine.run([("linear", op)], pos=range(rows if n_out is None else n_out + 3), out_row=range(n_out or 0))
    assert np.isnan(out[rows:]).all()
    return out[:rows]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("n,k", [(48, 32), (17, 64), (75, 96), (1, 576), (33, 1536), (16, 2080)])
def test_linear(machine, rng, dtype, n, k):
    m = Matrix(rng, dtype, n, k)
    for rows in (1, int(rng.integers(2, 10))):
        x = floats(rng, rows, k)
        got = linear(machine, m, x)
        bound = np.abs(x.astype(np.float64)) @ np.abs(m.values).T * 2.0**-20
        assert (np.abs(got - x.astype(np.float64) @ m.values.T) <= bound).all()


def test_rows_of_linear_do_not_influence_each_other(machine, rng):
    for dtype in FORMATS:
        m, x = Matrix(rng, dtype, 40, 288), floats(rng, 9, 288)
        whole = linear(machine, m, x)
        for rows in (1, 2, 5):
            start = int(rng.integers(0, 10 - rows))
            np.testing.assert_array_equal(linear(machine, m, np.ascontiguousarray(x[start : start + rows])), whole[start : start + rows])


def test_what_follows_the_product(machine, rng):
    m, x = Matrix(rng, "q8", 53, 64), floats(rng, 5, 64)
    plain = linear(machine, m, x).astype(np.float64)
    bias, onto = floats(rng, 53), floats(rng, 5, 53)
    for use_bias in (None, bias):
        for scale, softcap in [(1.0, 0.0), (0.375, 0.0), (1.0, 2.5), (-1.5, 30.0)]:
            for start in (None, onto):
                z = scale * (plain if use_bias is None else plain + use_bias)
                if softcap:
                    z = softcap * np.tanh(z / softcap)
                got = linear(machine, m, x, bias=use_bias, scale=scale, softcap=softcap, onto=start)
                np.testing.assert_allclose(got, z if start is None else z + start, rtol=2e-6, atol=4e-6)


def test_linear_of_the_wanted_rows(machine, rng):
    m, x = Matrix(rng, "q4", 96, 64), floats(rng, 3, 64)
    np.testing.assert_allclose(linear(machine, m, x, n_out=3), x.astype(np.float64) @ m.values.T, rtol=1e-5, atol=1e-5)
    assert linear(machine, m, x[:0], n_out=0).shape == (0, 96)


@pytest.mark.parametrize("dtype", FORMATS)
def test_embed(machine, rng, dtype):
    m, token = Matrix(rng, dtype, 83, 96), rng.integers(0, 83, 7)
    token[:2] = 0, 82
    out = poisoned(9, 96)
    machine.run([("embed", {"w": m.weight[0], "out": pointer(out), "scale": 24.5})], pos=range(7), token=token)
    np.testing.assert_allclose(out[:7], m.values[token] * 24.5, rtol=3e-7, atol=1e-8)
    assert np.isnan(out[7:]).all()


# ---- append ----

@pytest.mark.parametrize("dtypes", [("f32", "f32"), ("f16", "bf16"), ("bf16", "f16")], ids=ids)
@pytest.mark.parametrize("shape", [shape for shape in appending.CASES if shape[2] % 8 == 0], ids=str)
def test_append(machine, rng, shape, dtypes):
    appending.test_append(machine, rng, int(rng.integers(1, 9)), shape, dtypes)


def test_append_rows_of_several_sequences_and_groups(machine, rng):
    appending.test_rows_of_several_sequences_and_groups(machine, rng)


def test_append_rounds_to_nearest_even(machine):
    appending.test_rounds_to_nearest_even(machine)


def test_append_without_its_page_is_a_bad_plan(machine, rng):
    case, cache = appending.Case(rng, 2, 4, 2, 64, 64, 0, "none"), Cache(2, 2, 64)
    machine.run([case.op(cache)], pos=[127, 128], tables=[[([1], [0])]], status=lib.KV_BAD_PLAN)
    assert (cache.memory.reshape(2, -1)[0] == 0xFF).all()


# ---- attend over plain pages ----

@pytest.mark.parametrize("dtypes", PLAIN, ids=ids)
@pytest.mark.parametrize("length,window", [(1, 0), (127, 0), (128, 0), (129, 100), (300, 0), (300, 128), (520, 300)])
def test_attend(machine, rng, length, window, dtypes):
    group, head_dim = int(rng.integers(1, 9)), int(rng.choice([64, 80, 96, 128, 256]))
    for rows, prefill in ((1, False), (min(length, 6), False), (min(length, 6), True)):
        check(machine, rng, head_dim=head_dim, group=group, kv_heads=int(rng.integers(1, 3)), length=length, window=window, rows=rows,
                        prefill=prefill, dtypes=dtypes)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256])
@pytest.mark.parametrize("dtypes", PLAIN[:3], ids=ids)
def test_attend_head_sizes(machine, rng, head_dim, dtypes):
    for rows, prefill in ((1, False), (3, True)):
        check(machine, rng, head_dim=head_dim, group=int(rng.integers(1, 5)), length=int(rng.integers(130, 200)), dtypes=dtypes, rows=rows, prefill=prefill)


@pytest.mark.parametrize("group", [1, 3, 5, 7, 8, 9, 16, 20])
def test_attend_groups(machine, rng, group):
    for rows, prefill in ((1, False), (5, False), (5, True)):
        check(machine, rng, head_dim=32, group=group, kv_heads=1, rows=rows, length=150, prefill=prefill)


@pytest.mark.parametrize("prefill", [False, True])
def test_softcap_and_sinks(machine, rng, prefill):
    for softcap, sinks in ((2.0, False), (0.0, True), (30.0, True)):
        check(machine, rng, head_dim=64, group=2, softcap=softcap, sinks=sinks, rows=5, prefill=prefill)


@pytest.mark.parametrize("prefill", [False, True])
def test_holes(machine, rng, prefill):
    check(machine, rng, head_dim=32, group=3, kv_heads=1, length=1500, holes=(0, 2, 3, 4, 8), window=700 * prefill, rows=3, prefill=prefill)


def test_parts_of_several_pages(machine, rng):
    """Positions from which on a part has two pages, and four."""
    cache = Cache(6, 1, 32)
    for bases in ([3968, 4096, 4224, 4352], [12032, 12160, 12288, 12416, 12800, 13312], [28416, 28672, 28800, 29568, 29696], [0, 61440, 61568, 63488]):
        length, held = bases[-1] + 70, {b // PAGE for b in bases}
        sequence = attention.Sequence(rng, cache, length, list(range(6)), holes=set(range(-(-length // PAGE))) - held)
        positions = [sequence.length - 2, sequence.length - 1]
        qkv = floats(rng, 2, 4 * 32)
        out = attention.attend(machine, cache, qkv, 2, positions, [sequence.table])
        for row, pos in enumerate(positions):
            want = sequence.expected(qkv[row, :64].reshape(2, 32), pos, 2, 0.125, 0, 0.0, None)
            np.testing.assert_allclose(out[row], want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("head_dim", [48, 64])
def test_several_sequences(machine, rng, head_dim, prefill):
    """Rows of several sequences never share a tile."""
    heads, kv_heads = 4, 2
    pages = list(rng.permutation(12))
    cache = Cache(12, kv_heads, head_dim, "f16", "f16")
    sequences = [attention.Sequence(rng, cache, length, pages) for length in (5, 129, 300)]
    counts = [2, 7, 3]
    seq = np.repeat(np.arange(3), counts)
    positions = np.concatenate([np.arange(s.length - n, s.length) for s, n in zip(sequences, counts, strict=True)])
    qkv = floats(rng, len(seq), (heads + 2 * kv_heads) * head_dim)
    out = attention.attend(machine, cache, qkv, heads, positions, [s.table for s in sequences], seq=seq, prefill=prefill)
    within, _ = tolerance(prefill, head_dim, "f16")
    for row, (s, pos) in enumerate(zip(seq, positions, strict=True)):
        want = sequences[s].expected(qkv[row, : heads * head_dim].reshape(heads, head_dim), pos, 2, 0.125, 0, 0.0, None)
        np.testing.assert_allclose(out[row], want, rtol=within, atol=within)


@pytest.mark.parametrize("window", [0, 130])
def test_a_row_does_not_depend_on_its_company(machine, rng, window):
    heads, kv_heads, head_dim, length = 6, 2, 64, 400
    cache = Cache(8, kv_heads, head_dim)
    sequence = attention.Sequence(rng, cache, length, list(rng.permutation(8)))
    qkv = floats(rng, 12, (heads + 2 * kv_heads) * head_dim)
    positions = [120, 126, 127, 128, 129, 250, 255, 256, 257, 300, 398, 399]
    settings = {"window": window, "scale": 0.2}
    whole = attention.attend(machine, cache, qkv, heads, positions, [sequence.table], **settings)
    for i, pos in enumerate(positions):
        oldest = max(0, pos - window + 1) // PAGE if window else 0
        table = (sequence.pages[oldest : pos // PAGE + 1], sequence.bases[oldest : pos // PAGE + 1])
        assert (attention.attend(machine, cache, qkv[i : i + 1], heads, [pos], [table], **settings) == whole[i : i + 1]).all(), pos


def test_large_scores_do_not_overflow(machine, rng):
    attention.test_large_scores_do_not_overflow(machine, rng)


def test_nan_in_k_reaches_the_result(machine, rng):
    attention.test_nan_in_k_reaches_the_result(machine, rng)


# ---- quantized pages ----

@pytest.mark.parametrize("dtypes", PAIRS[:2], ids=ids)
@pytest.mark.parametrize("d", [16, 48, 64, 80, 96, 128, 192, 256])
def test_pages_to_the_bit(machine, rng, d, dtypes):
    quantized.check_pages(filled(machine, rng, dtypes, length=150, d=d, group=int(rng.integers(1, 4)), kv_heads=1, size=40))


@pytest.mark.parametrize("dtypes", PAIRS[:2], ids=ids)
@pytest.mark.parametrize("kind", quantized.KINDS)
def test_odd_values_to_the_bit(machine, rng, kind, dtypes):
    with np.errstate(all="ignore"):
        qkv = quantized.KINDS[kind](rng, 128 * 4 * 32).astype(np.float32).reshape(128, -1)
        quantized.check_pages(filled(machine, rng, dtypes, length=128, d=32, group=2, kv_heads=1, qkv=qkv, size=128))


@pytest.mark.parametrize("dtypes", PAIRS[:2], ids=ids)
def test_not_a_number_stays_visible(machine, rng, dtypes):
    quantized.test_not_a_number_stays_visible(machine, rng, dtypes)


@pytest.mark.parametrize("dtypes", PAIRS, ids=ids)
@pytest.mark.parametrize("length", [1, 17, 127, 128, 129, 300])
def test_quantized_lengths(machine, rng, length, dtypes):
    rows = filled(machine, rng, dtypes, length=length, d=int(rng.choice([64, 80, 96, 128])), kv_heads=1, size=128)
    compare(machine, rng, rows, last_rows(rows, 1), prefill=False)
    compare(machine, rng, rows, last_rows(rows, 5), prefill=False)
    compare(machine, rng, rows, last_rows(rows, 9), prefill=True)


@pytest.mark.parametrize("dtypes", PAIRS[:2], ids=ids)
@pytest.mark.parametrize("d", [16, 32, 48, 112, 192, 256])
def test_quantized_head_sizes(machine, rng, d, dtypes):
    rows = filled(machine, rng, dtypes, length=140, d=d, group=int(rng.integers(1, 5)), kv_heads=1, size=128)
    compare(machine, rng, rows, last_rows(rows, 2), prefill=False)


@pytest.mark.parametrize("dtypes", PAIRS[:4], ids=ids)
@pytest.mark.parametrize("window", [1, 100, 128, 200])
def test_quantized_windows(machine, rng, window, dtypes):
    rows = filled(machine, rng, dtypes, length=390, kv_heads=1, size=128)
    for prefill in (False, True):
        compare(machine, rng, rows, last_rows(rows, 5), prefill=prefill, window=window)


@pytest.mark.parametrize("dtypes", PAIRS, ids=ids)
@pytest.mark.parametrize("first_page", [31, 95])
def test_quantized_parts_of_several_pages(machine, rng, first_page, dtypes):
    """From where on a part has two pages, and four: each is copied while the one before is worked on. Windows leave out the first of a part."""
    start = first_page * PAGE
    rows = filled(machine, rng, dtypes, length=5 * PAGE + 70, d=int(rng.choice([32, 64, 128, 160])), kv_heads=1, start=start, size=128)
    for window in (0, 300):
        compare(machine, rng, rows, last_rows(rows, 2), prefill=False, window=window)


@pytest.mark.parametrize("dtypes", PAIRS[:2], ids=ids)
@pytest.mark.parametrize("prefill", [False, True])
def test_quantized_softcap_sinks_and_holes(machine, rng, prefill, dtypes):
    rows = filled(machine, rng, dtypes, length=600, kv_heads=1, size=128)
    sinks = floats(rng, rows.heads) * 3
    pages, bases, side = rows.table
    for dropped in ((), (0,), (1, 2)):
        held = [i for i in range(len(pages)) if i not in dropped]
        table = [pages[i] for i in held], [bases[i] for i in held], side
        compare(machine, rng, rows, last_rows(rows, 3), prefill=prefill, softcap=2.0, sinks=sinks, table=table)


@pytest.mark.parametrize("dtypes", PAIRS[:2], ids=ids)
def test_two_sequences_with_side_memory(machine, rng, dtypes):
    """Rows of both in one step, one of which fills its page."""
    from ..kernels.quant_cache import QuantCache, Rows

    heads, kv_heads, d = 4, 2, 32
    cache = QuantCache(4, kv_heads, d, *dtypes, n_sides=2)
    both = [Rows(cache, quantized.some_rows(rng, n, heads, kv_heads, d), heads, pages, side=side)
            for side, (n, pages) in enumerate(((128, [3, 1]), (131, [0, 2])))]
    both[0].append(machine, range(120))
    both[1].append(machine, range(128))
    data = np.concatenate([both[0].qkv[120:], both[1].qkv[128:]])
    op = {"qkv": pointer(data), "cache": cache.fields(), "heads": heads, "kv_heads": kv_heads, "head_dim": d}
    machine.run([("append", op)], pos=[*range(120, 128), *range(128, 131)], seq=[0] * 8 + [1] * 3, tables=[[r.table for r in both]])
    for rows in both:
        quantized.check_pages(rows)
        compare(machine, rng, rows, last_rows(rows, 2), prefill=False)


# ---- sample ----

@pytest.mark.parametrize("settings", sampling.SETTINGS, ids=str)
def test_draws(machine, rng, settings):
    for vocab in (1, 2, 127, 129, 1000, 5000):
        sampling.check(machine, floats(rng, vocab) * float(rng.choice([1, 4, 12])), settings, rng)


@pytest.mark.parametrize("settings", sampling.SETTINGS[::3], ids=str)
def test_repeat_penalty(machine, rng, settings):
    sampling.test_repeat_penalty(machine, rng, settings)


@pytest.mark.parametrize("settings", sampling.SETTINGS, ids=str)
def test_ties(machine, rng, settings):
    sampling.test_ties(machine, rng, settings)


def test_edges_of_draws(machine, rng):
    sampling.test_greedy_takes_the_lowest_id_among_equals(machine)
    sampling.test_all_masked_is_not_finite(machine)


def test_ties_at_the_edge_of_top_p_go_to_the_lower_id(machine):
    sampling.test_ties_at_the_edge_of_top_p_go_to_the_lower_id(machine)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 5}], ids=str)
def test_logits_that_are_not_finite(machine, rng, bad, settings):
    sampling.test_logits_that_are_not_finite(machine, rng, int(rng.integers(0, 999)), bad, settings)


def test_nothing_is_drawn_without_a_sampler(machine, rng):
    logits = floats(rng, 2, 100)
    assert machine.run([("sample", {"logits": pointer(logits), "vocab": 100})], pos=[0, 1], out_row=[0, 1]) == [-7, -7]


def test_formats_and_shapes_without_a_kernel_are_refused(machine):
    """Before anything runs, by name."""
    from kvrun.backends._abi import ffi

    plan = ffi.new("kv_op[]", 1)
    bounds = ffi.new("kv_cuda_bounds *", {"max_rows": 1, "max_out": 1, "max_pages": 1, "max_seqs": 1})

    def refusal(kind: str, fields: dict) -> str:
        plan[0].kind = getattr(machine.lib, f"KV_OP_{kind.upper()}")
        setattr(plan[0], kind, fields)
        assert machine.lib.kv_cuda_scratch(plan, 1, bounds) == -1
        return ffi.string(machine.lib.kv_cuda_error()).decode()

    heads = {"heads": 4, "kv_heads": 2}
    assert "heads of 60 channels" in refusal("attend", heads | {"head_dim": 60})
    assert "heads of 264 channels" in refusal("append", heads | {"head_dim": 264})
    assert "heads of 72 channels" in refusal("attend", heads | {"head_dim": 72, "cache": {"k_dtype": DTYPES["q4"]}})
    assert "impossible" in refusal("attend", {"heads": 3, "kv_heads": 2, "head_dim": 64})
    assert "impossible" in refusal("linear", {"w": {"n": 16, "k": 33}})
    assert "unknown kind" in refusal("sample", {"vocab": 0}) or "impossible" in refusal("sample", {"vocab": 0})

"""Q8 and Q4 pages: what goes in comes out within the bounds that the format promises, whatever the values are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrun.backends.reference_pages import (bf16, decode_page, encode_k_q4, encode_q8, encode_v_q4, f16, k_q4_parts, pair_channels, rotate,
                                            store_q8)
from kvrun.cache.formats import PAGE, SINKS, page_head_bytes, q4_group, q8_group

HEAD_DIMS = (16, 48, 64, 80, 96, 128, 256)
KINDS = ("normal", "outliers", "biased", "constant", "zero", "tiny", "subnormal", "large", "spread", "one slot")


def page_of_kind(kind: str, d: int, rng: np.random.Generator) -> np.ndarray:
    """bfloat16 values, float32 [128][d]."""
    x = rng.standard_normal((PAGE, d))
    if kind == "outliers":
        x[:, rng.integers(0, d, 2)] *= 50
    if kind == "biased":
        x += 30 * rng.standard_normal(d)
    if kind == "constant":
        x[:] = x[0]
    if kind == "zero":
        x[:] = 0
    if kind == "one slot":
        x[:] = 0
        x[rng.integers(PAGE)] = 7
    scale = {"tiny": 1e-6, "subnormal": 1e-39, "large": 3000, "spread": np.exp(8 * rng.standard_normal((PAGE, d)).clip(-2, 1))}
    return bf16((x * scale.get(kind, 1)).astype(np.float32))


cases = settings(max_examples=60)
inputs = (st.sampled_from(KINDS), st.sampled_from(HEAD_DIMS), st.integers(0, 2**32))


@given(st.sampled_from(HEAD_DIMS), st.integers(0, 2**32))
def test_rotation_is_its_own_inverse_and_keeps_lengths(d: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((3, d)).astype(np.float32)
    np.testing.assert_allclose(rotate(rotate(x)), x, atol=1e-5)
    np.testing.assert_allclose((rotate(x) ** 2).sum(1), (x**2).sum(1), rtol=1e-5)
    block = d & -d
    natural = np.array([[(-1) ** bin(i & j).count("1") for j in range(block)] for i in range(block)]) / np.sqrt(block)
    np.testing.assert_allclose(rotate(x)[:, :block], x[:, :block] @ natural, atol=1e-5)


def test_bf16_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng().integers(0, 2**32, 100_000, dtype=np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    want = torch.from_numpy(x.copy()).to(torch.bfloat16).float().numpy()
    want[np.abs(want) < 2.0**-126] = 0
    np.testing.assert_array_equal(bf16(x), want)


def test_f16_has_its_corner_cases() -> None:
    x = np.array([1e9, -1e9, -0.0, -1e-12, 2.0**-24, 2.0**-25, 3 * 2.0**-25, np.nan], np.float32)
    assert f16(x).view(np.uint16).tolist() == [0x7BFF, 0xFBFF, 0, 0, 1, 0, 2, 0x7E00]


@cases
@given(*inputs, st.booleans())
def test_q8(kind: str, d: int, seed: int, is_v: bool) -> None:
    """Half a step of the group, in rotated space; slots stored one by one or together are the same bytes."""
    rng = np.random.default_rng(seed)
    x = page_of_kind(kind, d, rng)
    page = np.full(page_head_bytes("q8", d, is_v=is_v), 0xFF, np.uint8)
    for slots in np.array_split(rng.permutation(PAGE), rng.integers(1, 129)):
        store_q8(page, slots, x[slots], is_v)
    together = np.zeros_like(page)
    store_q8(together, np.arange(PAGE), x, is_v)
    assert np.array_equal(page, together)

    codes, scale = encode_q8(x)
    assert np.abs(codes.astype(int)).max() <= 127
    group = q8_group(d)
    error = np.abs(rotate(decode_page(page, "q8", d, is_v)) - rotate(x)).reshape(PAGE, -1, group).max(axis=2)
    top = np.abs(rotate(x)).reshape(PAGE, -1, group).max(axis=2)
    # A scale that is a subnormal half is off by 2^-25 at most, 127 times that in its largest value.
    assert (error <= 0.502 * top / 127 + 128 * 2.0**-25 + 1e-5 * top).all()


@cases
@given(*inputs)
def test_q4_of_v(kind: str, d: int, seed: int) -> None:
    x = page_of_kind(kind, d, np.random.default_rng(seed))
    page = encode_v_q4(x)
    assert page.nbytes == page_head_bytes("q4", d, is_v=True)
    group = q4_group(d)
    y = rotate(x).reshape(PAGE, -1, group)
    error = np.abs(rotate(decode_page(page, "q4", d, True)).reshape(y.shape) - y).max(axis=2)
    span, top = y.max(axis=2) - y.min(axis=2), np.abs(y).max(axis=2)
    # half a step, and what rounding scale and zero to halves adds at both ends of the grid
    assert (error <= span / 30 + 2.0**-10 * top + 16 * 2.0**-25 + span * 2.0**-10).all()


@cases
@given(*inputs, st.booleans())
def test_q4_of_k(kind: str, d: int, seed: int, with_sinks: bool) -> None:
    """Half a step of each channel's own grid, most of the time much less where it matters."""
    rng = np.random.default_rng(seed)
    x = page_of_kind(kind, d, rng)
    first = SINKS if with_sinks else 0
    x[:first] *= 100
    qsq = np.exp(3 * rng.standard_normal(d)).astype(np.float32)
    page = encode_k_q4(x, qsq, first)
    assert page.nbytes == page_head_bytes("q4", d, is_v=False)
    parts = k_q4_parts(page, d)
    assert sorted(parts["chan"].flatten()) == list(range(d))
    assert set(parts["split"]) <= {4, 5, 6, 7, 8}
    bits = np.empty(d)
    bits[parts["chan"][:, 0]], bits[parts["chan"][:, 1]] = parts["split"], 8 - parts["split"]

    rest = x[first:]
    error = rest - decode_page(page, "q4", d, False)[first:]
    span, top = rest.max(axis=0) - rest.min(axis=0), np.abs(rest).max(axis=0)
    rounding = 2.0**-9 * top + 2.0**-16
    # The fits lessen the squared error, in which a grid over the whole range is off by half a step at most.
    step = np.where(bits > 0, span / np.maximum(2**bits - 1, 1), span)
    padded = np.concatenate([np.repeat(error[:1], first, axis=0), error])
    assert (np.sqrt((padded**2).mean(axis=0)) <= 0.5 * step + rounding).all()


def test_fits_and_pairs_beat_an_even_grid() -> None:
    """Error weighted as attention sees it, against 4 bits for every channel between minimum and maximum."""
    rng = np.random.default_rng()
    d = 64
    x = bf16((rng.standard_normal((PAGE, d)) * np.exp(rng.standard_normal(d))).astype(np.float32))
    qsq = np.exp(2 * rng.standard_normal(d)).astype(np.float32)
    low, step = x.min(axis=0), (x.max(axis=0) - x.min(axis=0)) / 15
    even = low + step * np.rint((x - low) / step)
    coded = decode_page(encode_k_q4(x, qsq, 0), "q4", d, False)
    weighted = [float((((y - x) ** 2).mean(axis=0) * qsq).sum()) for y in (coded, even)]
    assert weighted[0] < 0.5 * weighted[1]


@given(st.sampled_from(HEAD_DIMS), st.integers(0, 2**32))
def test_pairs(d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.choice([0.0, 1.0, 2.0], d) * np.exp(rng.choice([0, 4]) * rng.standard_normal(d))
    chan, split = pair_channels(w)
    high, low = w[chan[:, 0]], w[chan[:, 1]]
    assert (high >= low).all() and (np.diff(high) <= 0).all() and (np.diff(low) >= 0).all()
    assert (split[high == low] == 4).all(), "equals share their bits equally"
    assert (split[(low == 0) & (high > 0)] == 8).all(), "a channel that matters to nobody gives all its bits away"


def test_ties_take_the_lower_channel_first() -> None:
    chan, split = pair_channels(np.ones(16))
    assert chan.tolist() == [[i, 15 - i] for i in range(8)] and set(split) == {4}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("d", [64, 96])
def test_damage_is_never_rounded_away(bad: float, d: int) -> None:
    x = np.random.default_rng().standard_normal((PAGE, d)).astype(np.float32)
    x[40, 7] = bad
    k = decode_page(encode_k_q4(x, np.ones(d, np.float32), SINKS), "q4", d, False)
    assert np.isnan(k[:, 7]).all() and np.isfinite(np.delete(k, 7, axis=1)).all()
    v = decode_page(encode_v_q4(x), "q4", d, True)
    assert np.isnan(v[40]).any() and np.isfinite(np.delete(v, 40, axis=0)).all()
    for is_v in (False, True):
        page = np.zeros(page_head_bytes("q8", d, is_v=is_v), np.uint8)
        store_q8(page, np.arange(PAGE), x, is_v)
        y = decode_page(page, "q8", d, is_v)
        assert np.isnan(y[40]).any() and np.isfinite(np.delete(y, 40, axis=0)).all()


def test_beyond_the_range_of_halves_it_stays_finite() -> None:
    x = np.random.default_rng().standard_normal((PAGE, 64)).astype(np.float32) * 1e36   # a rotation adds 64 of them up
    page = np.zeros(page_head_bytes("q8", 64, is_v=True), np.uint8)
    store_q8(page, np.arange(PAGE), x, True)
    for y in (decode_page(page, "q8", 64, True), decode_page(encode_v_q4(x), "q4", 64, True),
              decode_page(encode_k_q4(x, np.ones(64, np.float32), 0), "q4", 64, False)):
        assert np.isfinite(y).all()


@cases
@given(*inputs)
def test_sinks_do_not_touch_the_other_slots(kind: str, d: int, seed: int) -> None:
    """Whatever stands in the first slots, the bytes of the page are the same."""
    rng = np.random.default_rng(seed)
    x = page_of_kind(kind, d, rng)
    other = x.copy()
    other[:SINKS] = rng.standard_normal((SINKS, d)) * 1000
    qsq = np.ones(d, np.float32)
    assert np.array_equal(encode_k_q4(x, qsq, SINKS), encode_k_q4(other, qsq, SINKS))


def test_many_pages_decode_as_one_does() -> None:
    rng = np.random.default_rng()
    for dtype in ("q8", "q4"):
        for is_v in (False, True):
            pages = np.zeros((2, 3, page_head_bytes(dtype, 96, is_v=is_v)), np.uint8)
            for page in pages.reshape(6, -1):
                x = rng.standard_normal((PAGE, 96)).astype(np.float32)
                if dtype == "q8":
                    store_q8(page, np.arange(PAGE), x, is_v)
                else:
                    page[:] = encode_v_q4(x) if is_v else encode_k_q4(x, np.ones(96, np.float32), 0)
            whole = decode_page(pages, dtype, 96, is_v)
            assert whole.shape == (2, 3, PAGE, 96)
            assert np.array_equal(whole[1, 2], decode_page(pages[1, 2], dtype, 96, is_v))

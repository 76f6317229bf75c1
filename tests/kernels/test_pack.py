"""kv_pack, kv_unpack: the layouts of kernels/page.h, written out again in numpy, and gguf's dequantizer as the oracle."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from kvrun.backends.native import DTYPES, ffi, lib

GGUF = {"q4_0": ("q4s", 32, 18), "q4_1": ("q4", 32, 20), "q4_k": ("q4", 256, 144), "q5_0": ("q8", 32, 22), "q8_0": ("q8", 32, 34),
        "q5_k": ("q8", 256, 176), "q6_k": ("q8", 256, 210)}
PACKED = [*((kind, dtype) for kind, (dtype, _, _) in GGUF.items()), ("q4_0", "q4")]
FLOATS = ("f32", "f16", "bf16")


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """uint16 bits, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """values in the bytes of `dtype`, as unsigned integers of its width."""
    if dtype == "bf16":
        return to_bf16(values)
    with np.errstate(over="ignore"):
        return values.astype({"f32": np.float32, "f16": np.float16}[dtype]).view({"f32": np.uint32, "f16": np.uint16}[dtype])


def gguf_rows(rng: np.random.Generator, kind: str, rows: int, k: int) -> np.ndarray:
    """uint8 [rows][bytes]: random blocks with every digit and finite factors, subnormal ones among them."""
    _, columns, size = GGUF[kind]
    blocks = rng.integers(0, 256, (rows, k // columns, size), dtype=np.uint8)
    factors = 2 if kind in ("q4_1", "q4_k", "q5_k") else 1
    scales = rng.standard_normal((rows, k // columns, factors)) * 10.0 ** rng.uniform(-6, 1, (rows, k // columns, 1))
    where = slice(-2, None) if kind == "q6_k" else slice(0, 2 * factors)
    blocks[:, :, where] = scales.astype(np.float16).view(np.uint8).reshape(rows, k // columns, -1)
    return blocks.reshape(rows, -1)


class Packed:
    """A packed weight in memory of exactly its size, filled with 0xA5 first."""

    def __init__(self, dtype: str, n: int, k: int) -> None:
        self.dtype, self.n, self.k = dtype, n, k
        self.bytes = np.full(lib.kv_pack_bytes(DTYPES[dtype], n, k), 0xA5, dtype=np.uint8)
        self.weight = ffi.new("kv_weight *", {"data": ffi.from_buffer(self.bytes), "dtype": DTYPES[dtype], "n": n, "k": k})

    def pack(self, rows: np.ndarray, src_dtype: str, row0: int = 0) -> int:
        source = np.ascontiguousarray(rows)
        return lib.kv_pack(self.weight, row0, len(source), ffi.from_buffer(source), DTYPES[src_dtype])

    def unpack(self, row0: int = 0, rows: int | None = None) -> np.ndarray:
        out = np.full((self.n - row0 if rows is None else rows, self.k), np.nan, dtype=np.float32)
        assert lib.kv_unpack(self.weight, row0, len(out), ffi.cast("float *", ffi.from_buffer(out))) == lib.KV_OK
        return out


def layout(dtype: str, values: np.ndarray, scale: np.ndarray | None = None, minimum: np.ndarray | None = None) -> np.ndarray:
    """The bytes that page.h prescribes. values [n][k]: stored numbers or digits; scale, minimum [n][k/32] float16."""
    n, k = values.shape
    padded = -(-n // 16) * 16

    def lanes(a: np.ndarray) -> np.ndarray:
        full = np.zeros((padded, *a.shape[1:]), dtype=a.dtype)
        full[:n] = a
        return full.reshape(padded // 16, 16, *a.shape[1:])

    def as_bytes(a: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(a).view(np.uint8)

    v = lanes(values)
    if dtype == "f32":
        return as_bytes(v.transpose(0, 2, 1)).reshape(-1)
    if dtype in ("f16", "bf16"):
        return as_bytes(v.reshape(-1, 16, k // 2, 2).transpose(0, 2, 1, 3)).reshape(-1)
    blocks = padded // 16, k // 32
    head = [as_bytes(lanes(s).transpose(0, 2, 1)).reshape(*blocks, 32) for s in (scale, minimum) if s is not None]
    if dtype == "q8":
        body = as_bytes(v.reshape(-1, 16, k // 32, 8, 4).transpose(0, 2, 3, 1, 4))
    else:
        groups = v.reshape(-1, 16, k // 32, 4, 2, 4).transpose(0, 2, 3, 1, 4, 5)  # [b][g][j][lane][low, high][i]
        body = as_bytes(groups[..., 0, :] | groups[..., 1, :] << 4)
    return np.concatenate([*head, body.reshape(*blocks, -1)], axis=-1).reshape(-1)


@pytest.mark.parametrize("n", [1, 15, 16, 50])
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_floats(rng, dtype, source, n):
    values = rng.standard_normal((n, 96)).astype(np.float32) * 10.0 ** rng.uniform(-7, 3, (n, 96)).astype(np.float32)
    values[0, :6] = [0, -0.0, 65504, -2.0**-24, 2.0**-14, 1 / 3]
    bits = stored(values, source)
    exact = {"f32": lambda: values, "f16": lambda: bits.view(np.float16).astype(np.float32), "bf16": lambda: from_bf16(bits)}[source]()
    packed = Packed(dtype, n, 96)
    assert packed.pack(bits, source) == lib.KV_OK
    expected = stored(exact, dtype)
    np.testing.assert_array_equal(packed.bytes, layout(dtype, expected))
    back = {"f32": lambda: expected.view(np.float32), "f16": lambda: expected.view(np.float16).astype(np.float32),
            "bf16": lambda: from_bf16(expected)}[dtype]()
    np.testing.assert_array_equal(packed.unpack(), back)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["q8", "q4"])
def test_what_is_not_finite_is_not_quantized_away(rng, dtype, value):
    rows = rng.standard_normal((16, 64)).astype(np.float32)
    rows[3, 37] = value
    packed = Packed(dtype, 16, 64)
    assert packed.pack(rows, "f32") == lib.KV_OK
    got = packed.unpack()
    assert np.isnan(got[3, 32:]).all()
    got[3, 32:] = 0
    assert np.isfinite(got).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_stays_so(dtype, value):
    for source in FLOATS:
        packed = Packed(dtype, 16, 32)
        with np.errstate(invalid="ignore"):
            rows = np.full((16, 32), value, dtype=np.float32)
            bits = stored(rows, source) if source != "bf16" else (rows.view(np.uint32) >> 16).astype(np.uint16)
        assert packed.pack(bits, source) == lib.KV_OK
        np.testing.assert_array_equal(packed.unpack(), rows)


@pytest.mark.parametrize("n", [1, 16, 40])
@pytest.mark.parametrize("kind,dtype", PACKED)
def test_gguf_values(rng, kind, dtype, n):
    k = 512
    rows = gguf_rows(rng, kind, n, k)
    expected = dequantize(rows, GGMLQuantizationType[kind.upper()])
    packed = Packed(dtype, n, k)
    assert packed.pack(rows, kind) == lib.KV_OK
    got = packed.unpack()
    if kind in ("q5_k", "q6_k"):                                 # a new scale, rounded to float16, and the nearest digit
        groups = np.abs(expected).reshape(n, k // 32, 32).max(axis=2).astype(np.float64)
        error = np.abs(got.astype(np.float64) - expected).reshape(n, k // 32, 32).max(axis=2)
        assert (error <= groups / 140 + 127 * 2.0**-25).all()
        return
    if kind != "q4_k":
        # Exact, but in q4 for -8*scale of a q4_0 scale beyond float16's range; none here is.
        np.testing.assert_array_equal(got, expected)
        return
    # Products of a float16 and a 6-bit factor are rounded to float16, where subnormals are 2^-24 apart.
    blocks = rows.reshape(n, k // 256, 144)
    d, dmin = (np.abs(blocks[:, :, i : i + 2].copy().view(np.float16).astype(np.float64)) for i in (0, 2))
    bound = (63 * 15 * d + 63 * dmin) * 2.0**-11 + 16 * 2.0**-25
    error = np.abs(got.astype(np.float64) - expected).reshape(n, k // 256, 256)
    assert (error <= bound * 1.0001).all()


def test_symmetric_blocks_keep_every_scale():
    """All finite float16 scales times all 16 digits come out as they went in, the largest too."""
    halves = np.arange(1 << 16).astype(np.uint16)
    scale = halves[np.isfinite(halves.view(np.float16))].reshape(-1, 4)
    rows = np.empty((len(scale), 4, 18), np.uint8)
    rows[:, :, :2] = scale[..., None].view(np.uint8)
    rows[:, :, 2:] = np.arange(16, dtype=np.uint8) * 16 + 15 - np.arange(16, dtype=np.uint8)
    packed = Packed("q4s", len(scale), 128)
    assert packed.pack(rows, "q4_0") == lib.KV_OK
    np.testing.assert_array_equal(packed.unpack(), dequantize(rows.reshape(len(scale), -1), GGMLQuantizationType.Q4_0))


@pytest.mark.parametrize("n", [3, 16, 33])
@pytest.mark.parametrize("kind,dtype", [pair for pair in PACKED if not pair[0].endswith("k")])
def test_gguf_layout(rng, kind, dtype, n):
    k = 96
    rows = gguf_rows(rng, kind, n, k)
    size = GGUF[kind][2]
    blocks = rows.reshape(n, k // 32, size)
    scale = blocks[:, :, :2].copy().view(np.float16)[:, :, 0]
    minimum = None
    if kind == "q8_0":
        digits = blocks[:, :, 2:]
    else:
        q = blocks[:, :, -16:]
        digits = np.concatenate([q & 15, q >> 4], axis=-1)
        if kind == "q5_0":
            high = np.unpackbits(blocks[:, :, 2:6], axis=-1, bitorder="little")
            digits = ((digits | high << 4).astype(np.int8) - 16).view(np.uint8)
        elif kind == "q4_1":
            minimum = blocks[:, :, 2:4].copy().view(np.float16)[:, :, 0]
        elif dtype == "q4":
            minimum = (scale.astype(np.float32) * -8).astype(np.float16)
    packed = Packed(dtype, n, k)
    assert packed.pack(rows, kind) == lib.KV_OK
    np.testing.assert_array_equal(packed.bytes, layout(packed.dtype, digits.reshape(n, k), scale, minimum))


@pytest.mark.parametrize("kind,dtype", [*PACKED, *((kind, kind) for kind in FLOATS)])
def test_parts_in_any_order(rng, kind, dtype):
    """Packing a matrix in pieces, also ones that end inside a block, gives the bytes of packing it whole."""
    n, k = 75, 256
    rows = stored(rng.standard_normal((n, k)).astype(np.float32), kind) if kind in FLOATS else gguf_rows(rng, kind, n, k)
    whole, parts = Packed(dtype, n, k), Packed(dtype, n, k)
    assert whole.pack(rows, kind) == lib.KV_OK
    cuts = [0, *sorted(rng.choice(np.arange(1, n), size=5, replace=False)), n]
    pieces = list(zip(cuts, cuts[1:], strict=False))
    rng.shuffle(pieces)
    for start, stop in pieces:
        assert parts.pack(rows[start:stop], kind, int(start)) == lib.KV_OK
    np.testing.assert_array_equal(parts.bytes, whole.bytes)
    np.testing.assert_array_equal(whole.unpack(17, 41), whole.unpack()[17:58])


def groups_of(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    """float32 [n][k] with groups of every kind: plain, with one large value, all equal, zero, far from zero, tiny."""
    values = rng.standard_normal((n, k // 32, 32)) * 10.0 ** rng.uniform(-3, 1, (n, k // 32, 1))
    kind = rng.integers(0, 8, (n, k // 32))
    values[kind == 1, 5] *= 50
    values[kind == 2] = values[kind == 2][:, :1]
    values[kind == 3] = 0
    values[kind == 4] += 40
    values[kind == 5] *= 1e-4
    return values.reshape(n, k).astype(np.float32)


def half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


def plain_q8_error(groups: np.ndarray) -> np.ndarray:
    """Squared error of each group [..., 32] under scale = max|x|/127, a half."""
    scale = half(np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127))
    with np.errstate(divide="ignore", invalid="ignore"):
        digits = np.where(scale > 0, np.clip(np.rint(groups / scale), -127, 127), 0)
    return ((digits * scale - groups).astype(np.float64) ** 2).sum(axis=-1)


@pytest.mark.parametrize("source", FLOATS)
def test_floats_to_q8(rng, source):
    """The search is never worse than the plain scale but for how that rounds, and better in the mean."""
    n, k = 40, 320
    bits = stored(groups_of(rng, n, k), source)
    x = {"f32": lambda: bits.view(np.float32), "f16": lambda: bits.view(np.float16).astype(np.float32), "bf16": lambda: from_bf16(bits)}[source]()
    packed = Packed("q8", n, k)
    assert packed.pack(bits, source) == lib.KV_OK
    groups = x.reshape(n, -1, 32)
    error = ((packed.unpack().reshape(groups.shape) - groups).astype(np.float64) ** 2).sum(axis=2)
    plain = plain_q8_error(groups)
    rounding = 32 * (np.abs(groups).max(axis=2) * 2.0**-11) ** 2 + 32 * (127 * 2.0**-25) ** 2
    assert (error <= 1.05 * plain + rounding).all()
    wide = (np.ptp(groups, axis=2) > 0.01 * np.abs(groups).max(axis=2)) & (plain > 0)
    assert np.median(error[wide] / plain[wide]) < 0.95


def least_q8_error(groups: np.ndarray) -> np.ndarray:
    """Squared error of each group [n, 32] under the best of 6000 scales, each fitted to its digits by least squares."""
    x = groups.astype(np.float64)
    top, least = np.abs(x).max(axis=1, keepdims=True), np.full(len(x), np.inf)
    for steps in np.linspace(10, 127.4, 6000):
        digits = np.clip(np.rint(x * (steps / top)), -127, 127)
        scale = (digits * x).sum(axis=1, keepdims=True) / (digits * digits).sum(axis=1, keepdims=True)
        least = np.minimum(least, ((digits * scale - x) ** 2).sum(axis=1))
    return least


@pytest.mark.parametrize("source", ["f32", "bf16"])
@pytest.mark.parametrize(("levels", "centred", "most"), [(16, True, 0.15), (16, False, 0.35), (32, True, 0.15), (32, False, 0.5)])
def test_values_on_a_coarse_grid_are_hardly_rounded_again(rng, levels, centred, most, source):
    """q8 of what Q4_0, Q5_0 (zero is on the grid), Q4_1, Q4_K, Q5_1 or Q5_K hold: nearly the least error that q8 has for
    them, and a fraction of the plain scale's."""
    n, k = 16, 256
    digits = np.clip(np.rint(rng.standard_normal((n * k // 32, 32)) * levels / 6 + levels / 2), 0, levels - 1)
    digits[:, 0], digits[:, 1] = 0, levels - 1                   # quantizers use the whole grid
    start = levels / 2 if centred else rng.uniform(0.3, 0.7, (len(digits), 1)) * (levels - 1)
    x = ((digits - start) * 10.0 ** rng.uniform(-3, 0, (len(digits), 1))).astype(np.float32)
    bits = stored(x, source)
    x = x if source == "f32" else from_bf16(bits)
    packed = Packed("q8", n, k)
    assert packed.pack(bits.reshape(n, k), source) == lib.KV_OK
    unit = np.abs(x).max(axis=1) ** 2.0                          # each group counts alike
    error = (((packed.unpack().reshape(x.shape) - x).astype(np.float64) ** 2).sum(axis=1) / unit).sum()
    assert error < most * (plain_q8_error(x) / unit).sum()
    assert error < 1.1 * (least_q8_error(x) / unit).sum() + 32 * 2.0**-24 * len(x)   # the scale is a half


def plain_q4_error(groups: np.ndarray) -> np.ndarray:
    """Squared error of each group [..., 32] under scale = (max - min)/15 and that minimum, in halves."""
    low = half(groups.min(axis=-1, keepdims=True))
    scale = half((groups.max(axis=-1, keepdims=True) - low) / 15)
    with np.errstate(divide="ignore", invalid="ignore"):
        digits = np.where(scale > 0, np.clip(np.rint((groups - low) / scale), 0, 15), 0)
    return ((digits * scale + low - groups).astype(np.float64) ** 2).sum(axis=-1)


@pytest.mark.parametrize("source", FLOATS)
def test_floats_to_q4(rng, source):
    """The search is never worse than the plain range but for the rounding of scale and minimum, and better in the mean."""
    n, k = 40, 320
    bits = stored(groups_of(rng, n, k), source)
    x = {"f32": lambda: bits.view(np.float32), "f16": lambda: bits.view(np.float16).astype(np.float32), "bf16": lambda: from_bf16(bits)}[source]()
    packed = Packed("q4", n, k)
    assert packed.pack(bits, source) == lib.KV_OK
    groups = x.reshape(n, -1, 32)
    error = ((packed.unpack().reshape(groups.shape) - groups).astype(np.float64) ** 2).sum(axis=2)
    plain = plain_q4_error(groups)
    rounding = 32 * (np.abs(groups).max(axis=2) * 2.0**-10) ** 2 + 1e-11  # halves are 2^-24 apart at least
    assert (error <= 1.1 * plain + rounding).all()
    wide = np.ptp(groups, axis=2) > 0.01 * np.abs(groups).max(axis=2)
    assert error[wide].sum() < 0.95 * plain[wide].sum()
    flat = np.ptp(groups, axis=2) == 0
    assert flat.any()
    np.testing.assert_array_equal(packed.unpack().reshape(groups.shape)[flat], half(groups[flat]))


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
def test_quantizing_what_was_quantized_gives_it_back(rng, kind):
    """Values on a grid of the format are found again, also after a detour through bfloat16, as far as that has them."""
    rows = gguf_rows(rng, kind, 32, 256)
    blocks = rows.reshape(32, 8, -1)
    blocks[:, :, :2] = (rng.uniform(0.01, 0.1, (32, 8)).astype(np.float16)).view(np.uint8).reshape(32, 8, 2)
    if kind == "q4_1":
        blocks[:, :, 2:4] = (rng.uniform(-1, 0, (32, 8)).astype(np.float16)).view(np.uint8).reshape(32, 8, 2)
    blocks[:, :, -16], blocks[:, :, -15] = (0xF0, 0x0F) if kind != "q8_0" else (0x81, 0x7F)   # both ends of the grid
    if kind == "q8_0":
        digits = blocks[:, :, 2:]
        digits[digits == 0x80] = 0x81                            # quantizers do not make -128
    exact = dequantize(rows, GGMLQuantizationType[kind.upper()])
    packed = Packed(GGUF[kind][0][:2], 32, 256)                   # floats become no q4s
    for source, tolerance in (("f32", 2.0**-10), ("bf16", 2.0**-6)):
        assert packed.pack(stored(exact, source), source) == lib.KV_OK
        error = np.abs(packed.unpack() - exact).reshape(32, 8, 32).max(axis=2)
        assert (error <= tolerance * np.abs(exact).reshape(32, 8, 32).max(axis=2)).all()


def test_sizes():
    sizes = {"f32": 4 * 16 * 64, "f16": 2 * 16 * 64, "bf16": 2 * 16 * 64, "q8": 2 * 544, "q4": 2 * 320, "q4s": 2 * 288}
    for dtype, block in sizes.items():
        assert lib.kv_pack_bytes(DTYPES[dtype], 16, 64) == block
        assert lib.kv_pack_bytes(DTYPES[dtype], 33, 64) == 3 * block
        assert lib.kv_pack_bytes(DTYPES[dtype], 16, 48) == -1
    for kind in (*GGUF, None):
        assert lib.kv_pack_bytes(DTYPES[kind] if kind else 99, 16, 64) == -1


def test_refused(rng):
    rows = gguf_rows(rng, "q4_1", 16, 64)
    packed = Packed("q4", 16, 64)
    before = packed.bytes.copy()
    for dtype, source, row0, count in [("q8", "q4_1", 0, 16), ("q4", "q8_0", 0, 16), ("bf16", "q4_1", 0, 16), ("q8", "q4_k", 0, 16),
                                       ("f32", "q8_0", 0, 16), ("q4", "q4_1", 1, 16), ("q4", "q4_1", -1, 1), ("q4", "q4_k", 0, 16),
                                       ("q4s", "q4_1", 0, 16), ("q4s", "q4_k", 0, 16), ("q4s", "f32", 0, 16), ("q4s", "bf16", 0, 16), ("q8", "q4_0", 0, 16)]:
        packed.weight.dtype = DTYPES[dtype]
        assert lib.kv_pack(packed.weight, row0, count, ffi.from_buffer(rows), DTYPES[source]) == lib.KV_BAD_PLAN
    np.testing.assert_array_equal(packed.bytes, before)
    out = np.empty((1, 64), dtype=np.float32)
    packed.weight.dtype = DTYPES["q4"]
    assert lib.kv_unpack(packed.weight, 16, 1, ffi.cast("float *", ffi.from_buffer(out))) == lib.KV_BAD_PLAN

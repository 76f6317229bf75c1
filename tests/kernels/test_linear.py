"""linear and embed on every instruction set, through kv_cpu_step, against numpy float64 of the unpacked weights."""

import numpy as np
import pytest

from kvrun.backends.native import DTYPES, ISAS, ffi, lib

GRANTED = [isa for isa, number in ISAS.items() if number <= lib.kv_cpu_isa()]
FORMATS = ["f32", "f16", "bf16", "q8", "q4", "q4s"]
BLOCKS = {"q8": ("q8_0", 34, 2), "q4": ("q4_1", 20, 4), "q4s": ("q4_0", 18, 2)}  # GGUF's kind, bytes, and those of its factors
ROWS = [1, 2, 3, 16, 17, 33, 130]


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


class Matrix:
    """Random packed weights with the values that they stand for."""

    def __init__(self, rng: np.random.Generator, dtype: str, n: int, k: int) -> None:
        size = lib.kv_pack_bytes(DTYPES[dtype], n, k)
        room = np.zeros(size + 64, dtype=np.uint8)
        start = -room.ctypes.data % 64
        self.bytes = room[start : start + size]
        self.weight = ffi.new("kv_weight *", {"data": ffi.from_buffer(self.bytes), "dtype": DTYPES[dtype], "n": n, "k": k})
        if dtype in BLOCKS:
            source, block, head = BLOCKS[dtype]
            rows = rng.integers(0, 256, (n, k // 32, block), dtype=np.uint8)
            factors = rng.uniform(0.001, 0.02, (n, k // 32, 2)) * (1, -8)
            rows[..., :head] = factors.astype(np.float16).view(np.uint8)[..., :head]
        else:
            source, rows = "f32", rng.standard_normal((n, k)).astype(np.float32)
        assert lib.kv_pack(self.weight, 0, n, ffi.from_buffer(rows), DTYPES[source]) == lib.KV_OK
        self.values = np.empty((n, k), dtype=np.float32)
        assert lib.kv_unpack(self.weight, 0, n, pointer(self.values)) == lib.KV_OK
        self.values = self.values.astype(np.float64)


def pointer(array: np.ndarray | None, kind: str = "float *"):
    return ffi.NULL if array is None else ffi.cast(kind, ffi.from_buffer(array))


class Step:
    """A plan of one op or two, run with scratch of exactly the size asked for and poisoned with NaN."""

    def __init__(self, isa: str, threads: int) -> None:
        self.isa, self.threads, self.large = ISAS[isa], threads, False
        self.cpu = lib.kv_cpu_open(self.isa, threads)
        assert self.cpu

    def close(self) -> None:
        lib.kv_cpu_close(self.cpu)

    def run(self, kind: str, fields: dict, rows: int, prefill: bool, token: np.ndarray | None = None, n_out: int = 0,
            act: dict | None = None) -> None:
        count = 1 + (act is not None) + self.large
        ops = ffi.new("kv_op[]", count)
        for op, name, values in zip(ops, (kind, "act"), (fields,) if act is None else (fields, act), strict=False):
            op.kind, op.layer = getattr(lib, f"KV_OP_{name.upper()}"), -1
            setattr(op, name, values)
        if self.large:  # a matrix that no cache holds, for a row that is not wanted: it is never read
            ops[count - 1].kind = lib.KV_OP_LINEAR
            ops[count - 1].linear = {"w": {"n": 1 << 20, "k": 1024, "dtype": lib.KV_F32}, "rows": lib.KV_ROWS_OUT}
        size = lib.kv_cpu_scratch(ops, count, rows, 1, self.threads, self.isa)
        room = np.full(size // 4 + 48, np.nan, dtype=np.float32)
        start = (-room.ctypes.data % 64) // 4
        scratch = room[start : start + size // 4]
        index = np.arange(rows, dtype=np.int32)
        zeros = np.zeros(rows, dtype=np.int32)
        arrays = {"token": zeros if token is None else token, "pos": index, "seq": zeros, "out_row": index}
        s = ffi.new("kv_state *", {"n_rows": rows, "n_out": n_out, "n_seqs": 1, "prefill": prefill,
                                   **{name: pointer(a, "int32_t *") for name, a in arrays.items()}})
        assert lib.kv_cpu_step(self.cpu, ops, count, s, pointer(scratch, "void *")) == lib.KV_OK
        assert np.isnan(room[start + size // 4 :]).all(), "wrote past its scratch"

    def linear(self, m: Matrix, x: np.ndarray, *, prefill: bool, bias=None, scale=1.0, softcap=0.0, onto=None, out_rows=False):
        """[rows][n]; two guard rows behind the result must stay NaN."""
        rows, n = len(x), m.weight.n
        out = np.full((rows + 2, n), np.nan, dtype=np.float32)
        if onto is not None:
            out[:rows] = onto
        fields = {"w": m.weight[0], "bias": pointer(bias), "x": pointer(x), "out": pointer(out), "scale": scale, "softcap": softcap,
                  "rows": lib.KV_ROWS_OUT if out_rows else lib.KV_ROWS_ALL, "accumulate": onto is not None}
        self.run("linear", fields, rows + 5 if out_rows else rows, prefill, n_out=rows if out_rows else 0)
        assert np.isnan(out[rows:]).all(), "wrote past its rows"
        return out[:rows]


@pytest.fixture(scope="module", params=GRANTED)
def step(request):
    step = Step(request.param, 2)
    step.name = request.param
    yield step
    step.close()


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """float64 values to `bits` significant bits, to nearest even."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(mantissa * 2.0**bits), exponent - bits)


def check(step: Step, got: np.ndarray, m: Matrix, x: np.ndarray, prefill: bool) -> None:
    """float32 accumulation's bound on |got - x W^T|; on AMX tiles that of weights in bfloat16 and activations in 16 bits, or 8
    where there are more columns than rows; for decoding with weights in 8 and 4 bits that of activations in 16 bits, 32 to a scale."""
    x, w, slack = x.astype(np.float64), m.values, 0.0
    if not prefill and step.name != "plain" and m.weight.dtype in (lib.KV_Q8, lib.KV_Q4, lib.KV_Q4S):
        half_step = np.abs(x).reshape(len(x), -1, 32).max(axis=2) / 32639 / 2 * 1.0001
        slack = half_step @ np.abs(w).reshape(len(w), -1, 32).sum(axis=2).T
    if prefill and step.name == "amx" and m.weight.dtype not in (lib.KV_F32, lib.KV_F16):
        w = rounded(w, 8)
        if m.weight.k > m.weight.n:
            x = rounded(x, 8)
        slack = 2.0**-16 * np.abs(x) @ np.abs(w).T
        # A widened weight is rounded to float32 first, which now and then tips it to the other bfloat16 neighbour.
        slack += 2.0**-8 * np.sqrt(x**2 @ (m.values**2).T) * 0.05
    bound = np.abs(x) @ np.abs(w).T * 2.0**-20 + slack
    error = np.abs(got - x @ w.T)
    assert (error <= bound).all(), f"{(error / bound).max():.3f} times the bound at {np.unravel_index((error / bound).argmax(), error.shape)}"


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_product(rng, step, dtype, prefill):
    shapes = [(48, 32), (17, 64), (75, 96), (192, 576), (1, 1536), (130, 1536)]
    for n, k in shapes:
        m = Matrix(rng, dtype, n, k)
        for rows in ROWS:
            x = rng.standard_normal((rows, k)).astype(np.float32)
            check(step, step.linear(m, x, prefill=prefill), m, x, prefill)


@pytest.mark.parametrize("kind", ["SILU", "GELU_TANH"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_projection_and_its_activation_in_one_plan(rng, step, dtype, kind):
    """The same bits as one after the other, for prompts and for decode rows."""
    for dim, k in ((16, 64), (1536, 576), (40, 96), (640, 288)):
        m = Matrix(rng, dtype, 2 * dim, k)
        for rows, prefill in ((1, True), (37, True), (300, True), (1, False), (5, False)):
            x = rng.standard_normal((rows, k)).astype(np.float32)
            outs = []
            for together in (True, False):
                between, out = np.full((rows, 2 * dim), np.nan, np.float32), np.full((rows + 1, dim), np.nan, np.float32)
                linear = {"w": m.weight[0], "x": pointer(x), "out": pointer(between), "scale": 1.0, "rows": lib.KV_ROWS_ALL}
                act = {"x": pointer(between), "out": pointer(out), "dim": dim, "kind": getattr(lib, f"KV_{kind}")}
                step.run("linear", linear, rows, prefill, act=act if together else None)
                if not together:
                    step.run("act", act, rows, prefill)
                assert np.isnan(out[rows:]).all() and np.isfinite(out[:rows]).all()
                outs.append(out[:rows])
            np.testing.assert_array_equal(*outs)


def test_many_rows(rng, step):
    """More rows than fit in a core's cache at once, over few and over many threads."""
    m = Matrix(rng, "q4", 40, 1536)
    x = rng.standard_normal((700, 1536)).astype(np.float32)
    whole = step.linear(m, x, prefill=True)
    check(step, whole, m, x, True)
    for threads, rows in ((1, 700), (1, 532), (5, 700), (2, 540)):
        other = Step(step.name, threads)
        np.testing.assert_array_equal(other.linear(m, np.ascontiguousarray(x[:rows]), prefill=True), whole[:rows])
        other.close()


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_rows_do_not_influence_each_other(rng, step, dtype, prefill):
    """Bit for bit: a row alone, among others, in another place, on any number of threads."""
    m = Matrix(rng, dtype, 139, 288)
    x = rng.standard_normal((130, 288)).astype(np.float32)
    whole = step.linear(m, x, prefill=prefill)
    for rows in [*ROWS, 5, 7, 12, 24, 64, 65]:
        start = int(rng.integers(0, len(x) - rows + 1))
        part = np.ascontiguousarray(x[start : start + rows])
        np.testing.assert_array_equal(step.linear(m, part, prefill=prefill), whole[start : start + rows])
    for threads in (1, 3):
        other = Step(step.name, threads)
        np.testing.assert_array_equal(other.linear(m, x, prefill=prefill), whole)
        other.close()


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_large_model_is_read_another_way(rng, step, dtype):
    """In more streams at once: the same result, for any number of blocks."""
    for n in (1, 16, 17, 48, 75, 139, 400):
        m = Matrix(rng, dtype, n, 288)
        x = rng.standard_normal((3, 288)).astype(np.float32)
        want = step.linear(m, x, prefill=False)
        step.large = True
        np.testing.assert_array_equal(step.linear(m, x, prefill=False), want)
        np.testing.assert_array_equal(step.linear(m, np.ascontiguousarray(x[1:2]), prefill=False), want[1:2])
        step.large = False


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
@pytest.mark.parametrize("n", [48, 53])
def test_what_follows_the_product(rng, step, n, prefill):
    m = Matrix(rng, "q8", n, 64)
    x = rng.standard_normal((19, 64)).astype(np.float32)
    plain = step.linear(m, x, prefill=prefill).astype(np.float64)
    bias = rng.standard_normal(n).astype(np.float32)
    onto = rng.standard_normal((19, n)).astype(np.float32)
    for use_bias in (None, bias):
        for scale, softcap in [(1.0, 0.0), (0.375, 0.0), (1.0, 2.5), (-1.5, 30.0)]:
            for start in (None, onto):
                z = scale * (plain if use_bias is None else plain + use_bias)
                if softcap:
                    z = softcap * np.tanh(z / softcap)
                got = step.linear(m, x, prefill=prefill, bias=use_bias, scale=scale, softcap=softcap, onto=start)
                np.testing.assert_allclose(got, z if start is None else z + start, rtol=2e-6, atol=4e-6)


def test_only_the_wanted_rows(rng, step):
    m = Matrix(rng, "q4", 96, 64)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    for prefill in (False, True):
        check(step, step.linear(m, x, prefill=prefill, out_rows=True), m, x, prefill)
    assert step.linear(m, x[:0], prefill=False, out_rows=True).shape == (0, 96)


def test_extremes(rng, step):
    """Large, tiny and zero activations; NaN stays in its row."""
    m = Matrix(rng, "q4", 32, 64)
    x = rng.standard_normal((5, 64)).astype(np.float32) * np.float32([[1e30], [1e-30], [0], [1], [1]])
    x[3, 7] = np.nan
    for prefill in (False, True):
        got = step.linear(m, x, prefill=prefill)
        assert np.isnan(got[3]).all()
        rows = [0, 1, 2, 4]
        check(step, got[rows], m, x[rows], prefill)


@pytest.mark.parametrize("dtype", FORMATS)
def test_embed(rng, step, dtype):
    m = Matrix(rng, dtype, 83, 96)
    token = rng.integers(0, 83, 40).astype(np.int32)
    token[:2] = 0, 82
    for scale in (1.0, 24.5):
        out = np.full((42, 96), np.nan, dtype=np.float32)
        step.run("embed", {"w": m.weight[0], "out": pointer(out), "scale": scale}, 40, True, token=token)
        np.testing.assert_allclose(out[:40], m.values[token] * scale, rtol=3e-7, atol=1e-8)
        assert np.isnan(out[40:]).all()


def test_scratch_for_more_rows_does_for_fewer(step):
    ops = ffi.new("kv_op[]", 1)
    ops[0].kind = lib.KV_OP_LINEAR
    for dtype in FORMATS:
        for k in (64, 1536, 8192):
            ops[0].linear = {"w": {"dtype": DTYPES[dtype], "n": 64, "k": k}}
            for threads in (1, 2, 5, 64):
                sizes = [lib.kv_cpu_scratch(ops, 1, rows, 1, threads, ISAS[step.name]) for rows in range(1, 1500, 7)]
                assert sizes == sorted(sizes)

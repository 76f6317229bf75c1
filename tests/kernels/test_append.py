"""append: norms, rotation and stores, against numpy in float64."""

import itertools

import numpy as np
import pytest

from kvrun.backends.native import DTYPES, lib

from .plans import PAGE, Cache, floats, loaded, pointer, stored

NORMS = {"none": lib.KV_QK_NONE, "head": lib.KV_QK_HEAD, "whole": lib.KV_QK_WHOLE}


def rms_norm(x, w, offset, eps):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * (w + offset)


def rotate(x, cos, sin, interleaved):
    """x [R][heads][rope_dim], cos and sin [R][1][rope_dim/2]."""
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    out = np.empty_like(x)
    first, second = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        out[..., 0::2], out[..., 1::2] = first, second
    else:
        out[..., :half], out[..., half:] = first, second
    return out


class Case:
    """Random rows and what must come out of them."""

    def __init__(self, rng, rows, heads, kv_heads, head_dim, rope_dim, interleaved, qk_norm):
        self.shape = (heads, kv_heads, head_dim)
        self.qkv = floats(rng, rows, (heads + 2 * kv_heads) * head_dim) * 3
        self.rope = floats(rng, rows, 2, rope_dim // 2) if rope_dim else None
        size = {"none": (0, 0), "head": (head_dim, head_dim), "whole": (heads * head_dim, kv_heads * head_dim)}[qk_norm]
        self.q_norm, self.k_norm = (floats(rng, n) if n else None for n in size)
        self.offset, self.eps = float(rng.choice([0, 1])), 1e-6
        self.settings = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "rope_dim": rope_dim, "interleaved": interleaved,
                         "qk_norm": NORMS[qk_norm], "eps": self.eps, "w_offset": self.offset}
        x = self.qkv.astype(np.float64)
        q, k, v = np.split(x, [heads * head_dim, (heads + kv_heads) * head_dim], axis=1)
        if qk_norm == "whole":
            q, k = rms_norm(q, self.q_norm, self.offset, self.eps), rms_norm(k, self.k_norm, self.offset, self.eps)
        q, k, self.v = (t.reshape(rows, -1, head_dim) for t in (q, k, v))
        if qk_norm == "head":
            q, k = rms_norm(q, self.q_norm, self.offset, self.eps), rms_norm(k, self.k_norm, self.offset, self.eps)
        self.q, self.k = q.copy(), k.copy()
        if rope_dim:
            cos, sin = self.rope[:, None, 0], self.rope[:, None, 1]
            for t in (self.q, self.k):
                t[..., :rope_dim] = rotate(t[..., :rope_dim].copy(), cos, sin, interleaved)

    def op(self, cache):
        return ("append", {"qkv": pointer(self.qkv), "rope": pointer(self.rope), "q_norm": pointer(self.q_norm),
                           "k_norm": pointer(self.k_norm), "cache": cache.fields(), **self.settings})

    def check(self, cache, where, pages):
        """where: [(page, slot)] of each row. Bytes outside of them must be untouched in `pages`."""
        heads, kv_heads, d = self.shape
        got_q = self.qkv[:, : heads * d].reshape(-1, heads, d)
        np.testing.assert_allclose(got_q, self.q, rtol=1e-5, atol=1e-5)
        for h, which in itertools.product(range(kv_heads), "kv"):
            dtype = cache.k_dtype if which == "k" else cache.v_dtype
            want = (self.k if which == "k" else self.v)[:, h]
            bits = {page: cache.tokens(page, h, which) for page in range(pages)}
            got = np.stack([bits[page][slot] for page, slot in where])
            step = {"f32": 2e-6, "f16": 2.0**-10, "bf16": 2.0**-7}[dtype]     # one unit in the last place
            np.testing.assert_allclose(loaded(got, dtype), want, rtol=step, atol=1e-5)
            if which == "v":
                assert (got == stored(want.astype(np.float32), dtype)).all()  # V is only rounded
            untouched = np.ones((pages, PAGE), dtype=bool)
            for page, slot in where:
                untouched[page, slot] = False
            for page in range(pages):
                assert np.isnan(loaded(bits[page][untouched[page]], dtype)).all()


CASES = [  # heads, kv_heads, head_dim, rope_dim, interleaved, qk_norm
    (9, 3, 64, 64, 0, "none"), (4, 1, 256, 256, 0, "head"), (8, 2, 128, 128, 0, "head"), (8, 8, 96, 96, 1, "none"),
    (6, 2, 80, 32, 0, "none"), (4, 4, 64, 24, 1, "whole"), (2, 1, 34, 10, 0, "head"), (3, 1, 64, 0, 0, "whole"), (2, 2, 2, 2, 1, "none"),
]


@pytest.mark.parametrize("dtypes", [("f32", "f32"), ("f16", "bf16"), ("bf16", "f16")], ids="/".join)
@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_append(machine, rng, rows, shape, dtypes):
    case = Case(rng, rows, *shape)
    cache = Cache(3, shape[1], shape[2], *dtypes)
    start = int(rng.integers(PAGE, 2 * PAGE))
    positions, table = range(start, start + rows), ([2, 0], [PAGE, 2 * PAGE])
    before = machine.appended
    machine.run([case.op(cache)], pos=positions, tables=[[table]])
    assert machine.appended - before == rows
    case.check(cache, [(2 if p < 2 * PAGE else 0, p % PAGE) for p in positions], 3)


def test_rows_of_several_sequences_and_groups(machine, rng):
    case, cache = Case(rng, 4, 4, 2, 64, 64, 0, "none"), Cache(5, 2, 64, group=1)
    tables = [[([], []), ([], [])], [([4, 1], [0, 512]), ([3], [128])]]          # a hole before 512
    machine.run([case.op(cache)], pos=[3, 4, 515, 130], seq=[0, 0, 0, 1], tables=tables)
    case.check(cache, [(4, 3), (4, 4), (1, 3), (3, 2)], 5)


def test_rounds_to_nearest_even(machine):
    ties = np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11, 65504, 65519, 65520, 1e-7, 2.0**-25, 3 * 2.0**-25, 6e-5, -0.0, 1e30, 2.0**-14 - 2.0**-26,
                     1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.3895e38, 1.5], dtype=np.float32)
    for dtype in ("f16", "bf16"):
        cache, qkv = Cache(1, 1, 16, dtype, dtype), np.concatenate([ties, ties, ties])[None]
        op = {"qkv": pointer(qkv), "cache": cache.fields(), "heads": 1, "kv_heads": 1, "head_dim": 16}
        machine.run([("append", op)], pos=[5], tables=[[([0], [0])]])
        for which in "kv":
            assert (cache.tokens(0, 0, which)[5] == stored(ties, dtype)).all()


def test_position_without_a_page_is_refused(machine, rng):
    case, cache = Case(rng, 1, 2, 1, 32, 32, 0, "none"), Cache(1, 1, 32)
    for position in (0, 300):
        machine.run([case.op(cache)], pos=[position], tables=[[([0], [128])]], status=lib.KV_BAD_PLAN)
        assert (cache.memory == 0xFF).all()


def test_page_bytes(rng):
    for dtype in ("f32", "f16", "bf16"):
        cache = Cache(1, 1, 80, dtype, dtype)
        assert lib.kv_page_bytes(DTYPES[dtype], 80, False) == cache.head(0, 0, "k").nbytes == cache.head(0, 0, "v").nbytes
    assert [lib.kv_page_bytes(DTYPES[dtype], dim, 0) for dtype, dim in (("q4_k", 64), ("f32", 63), ("f32", 0))] == [-1] * 3

"""Decode rows' ops that are launched as one kernel: what they give is what the ops give one by one, and fewer launches do it."""

import ctypes

import numpy as np
import pytest

from kvrun.backends.batch import Batch, Sampler
from kvrun.backends.native import lib
from kvrun.hub import resolve
from kvrun.runtime import open_engine

from ..engine.tiny_model import random_model
from ..kernels.plans import PAGE, Cache, floats, pointer, poisoned
from ..kernels.quant_cache import QuantCache
from ..kernels.test_append import NORMS, rms_norm
from ..kernels.test_linear import FORMATS, Matrix

SHAPES = [(4, 2, 64, "head"), (3, 1, 128, "none"), (2, 2, 16, "head"), (5, 1, 80, "none"), (2, 1, 256, "none"), (9, 3, 96, "head")]
"""heads, kv_heads, head_dim, qk_norm"""


class Layer:
    """The first half of a layer: norm, q, k and v, append."""

    def __init__(self, rng, dtype, rows, heads, kv_heads, head_dim, qk_norm, cache, hidden=96) -> None:
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.x, self.w = floats(rng, rows, hidden) * 4, floats(rng, hidden)
        self.matrix = Matrix(rng, dtype, (heads + 2 * kv_heads) * head_dim, hidden)
        self.bias = floats(rng, self.matrix.weight.n) if rng.integers(2) else None
        self.offset, rope_dim = float(rng.integers(2)), head_dim // 2 * int(rng.integers(3))
        self.rope = floats(rng, rows, 2, rope_dim // 2) if rope_dim else None
        norms = [floats(rng, head_dim) if qk_norm == "head" else None for _ in "qk"]
        self.norms, self.cache = norms, cache
        shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        self.append = {**shape, "rope": pointer(self.rope), "q_norm": pointer(norms[0]), "k_norm": pointer(norms[1]), "rope_dim": rope_dim,
                       "interleaved": int(rng.integers(2)), "qk_norm": NORMS[qk_norm], "eps": 1e-6, "w_offset": self.offset}

    def buffers(self):
        return poisoned(*self.x.shape), poisoned(len(self.x), self.matrix.weight.n)

    def ops(self, h, qkv, cache):
        norm = {"x": pointer(self.x), "w": pointer(self.w), "out": pointer(h), "dim": h.shape[1], "rows": lib.KV_ROWS_ALL, "eps": 1e-5, "w_offset": self.offset,
                "scale": 1.0}
        linear = {"w": self.matrix.weight[0], "bias": pointer(self.bias), "x": pointer(h), "out": pointer(qkv), "rows": lib.KV_ROWS_ALL, "scale": 1.0}
        return [("norm", norm), ("linear", linear), ("append", {**self.append, "qkv": pointer(qkv), "cache": cache.fields()})]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_qkv(machine, rng, shape, dtype):
    """Over a page border where no page is quantized as a whole, with what each op stores, and the cache to the bit."""
    heads, kv_heads, d, _ = shape
    for rows in (1, int(rng.integers(2, 10))):
        make = [lambda: Cache(2, kv_heads, d, "f32", "f16"), lambda: QuantCache(2, kv_heads, d, "q8", "q8"), lambda: QuantCache(2, kv_heads, d, "q4", "q8")][
            int(rng.integers(3))]
        cache, plain = make(), make()
        whole = isinstance(cache, QuantCache) and cache.side_stride
        start = int(rng.integers(0, PAGE - rows)) if whole else int(rng.integers(PAGE - rows, PAGE))
        layer = Layer(rng, dtype, rows, *shape, cache)
        settings = {"pos": range(start, start + rows), "tables": [[([1, 0], [0, PAGE], 0) if whole else ([1, 0], [0, PAGE])]]}
        h, qkv = layer.buffers()
        before = machine.appended
        machine.run(layer.ops(h, qkv, cache), **settings)
        assert machine.appended - before == rows

        x = layer.x.astype(np.float64)
        normed = rms_norm(x, layer.w, layer.offset, 1e-5)
        np.testing.assert_allclose(h, normed, rtol=1e-5, atol=1e-6)
        want = normed @ layer.matrix.values.T + (0 if layer.bias is None else layer.bias)
        bound = np.abs(normed) @ np.abs(layer.matrix.values).T * 2.0**-19 + 1e-6
        q = heads * d
        assert (np.abs(qkv - want)[:, q:] <= bound[:, q:]).all()
        # What k and v became in the cache is what append alone makes of them; q within rounding.
        again = qkv.copy()
        again[:, :q] = want[:, :q]
        machine.run([("append", {**layer.append, "qkv": pointer(again), "cache": plain.fields()})], **settings)
        assert (cache.memory == plain.memory).all()
        if whole:
            open_pages = kv_heads * PAGE * d * 2                # behind them come sums over q
            assert (cache.side[:, :open_pages] == plain.side[:, :open_pages]).all()
        if layer.append["qk_norm"] == NORMS["none"]:
            spread = np.abs(bound[:, :q]).reshape(rows, heads, d).max(axis=2, keepdims=True) * 3
            assert (np.abs((qkv - again)[:, :q]).reshape(rows, heads, d) <= spread * max(1, np.abs(layer.rope).max() if layer.rope is not None else 1)).all()
        else:
            np.testing.assert_allclose(qkv[:, :q], again[:, :q], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("kind", ["KV_SILU", "KV_GELU_TANH"])
def test_gated(machine, rng, kind, dtype):
    for rows, ffn, hidden in ((1, 48, 64), (int(rng.integers(2, 10)), 16 * int(rng.integers(1, 9)), 32 * int(rng.integers(1, 20)))):
        x, w, matrix = floats(rng, rows, hidden), floats(rng, hidden), Matrix(rng, dtype, 2 * ffn, hidden)
        bias = floats(rng, 2 * ffn) if rng.integers(2) else None
        h, both, out = poisoned(rows + 1, hidden), poisoned(rows + 1, 2 * ffn), poisoned(rows + 1, ffn)
        ops = [("norm", {"x": pointer(x), "w": pointer(w), "out": pointer(h), "dim": hidden, "rows": lib.KV_ROWS_ALL, "eps": 1e-5, "w_offset": 1.0, "scale": 1.0}),
               ("linear", {"w": matrix.weight[0], "bias": pointer(bias), "x": pointer(h), "out": pointer(both), "rows": lib.KV_ROWS_ALL, "scale": 1.0}),
               ("act", {"x": pointer(both), "out": pointer(out), "dim": ffn, "kind": getattr(lib, kind)})]
        machine.run(ops, pos=range(rows))
        normed = rms_norm(x.astype(np.float64), w, 1.0, 1e-5)
        np.testing.assert_allclose(h[:rows], normed, rtol=1e-5, atol=1e-6)
        want = normed @ matrix.values.T + (0 if bias is None else bias)
        assert (np.abs(both[:rows] - want) <= np.abs(normed) @ np.abs(matrix.values).T * 2.0**-19 + 1e-6).all()
        gate, up = both[:rows, :ffn].astype(np.float64), both[:rows, ffn:].astype(np.float64)
        inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
        acted = gate / (1 + np.exp(-gate)) if kind == "KV_SILU" else 0.5 * gate * (1 + np.tanh(inner))
        np.testing.assert_allclose(out[:rows], acted * up, rtol=2e-5, atol=2e-5)
        assert all(np.isnan(b[rows:]).all() for b in (h, both, out))


@pytest.mark.parametrize("prefill", [False, True])
def test_a_layer_in_one_step(machine, rng, prefill):
    """Two times norm, q, k, v, append and attention over parts in one launch of a step: as each op in a step of its own."""
    rows, shape = 5, (4, 2, 64, "none")
    layers = [Layer(rng, "bf16", rows, *shape, Cache(4, 2, 64, "f16", "f16")) for _ in range(2)]
    start, tables = 3 * PAGE + 7, [[([3, 1, 0, 2], [0, PAGE, 2 * PAGE, 3 * PAGE])]]
    for layer in layers:                                       # what was there before
        old = floats(rng, 3 * PAGE + 7, 8 * 64) * 0.3
        for at in range(0, len(old), 64):
            part = np.ascontiguousarray(old[at : at + 64])
            machine.run([("append", {**layer.append, "rope": pointer(None), "rope_dim": 0, "qkv": pointer(part), "cache": layer.cache.fields()})],
                        pos=range(at, at + len(part)), tables=tables, prefill=True)

    def ops(layer):
        h, qkv = layer.buffers()
        out = poisoned(rows, 4 * 64)
        attend = {"qkv": pointer(qkv), "out": pointer(out), "cache": layer.cache.fields(), "heads": 4, "kv_heads": 2, "head_dim": 64, "scale": 0.125}
        return [*layer.ops(h, qkv, layer.cache), ("attend", attend)], (h, qkv, out)

    settings = {"pos": range(start, start + rows), "tables": tables, "prefill": prefill}
    (first, a), (second, b) = map(ops, layers)
    machine.run(first + second, **settings)
    for layer, got in zip(layers, (a, b), strict=True):
        one_by_one, held = ops(layer)
        for op in one_by_one:
            machine.run([op], **settings)
        np.testing.assert_allclose(got[0], held[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[2], held[2], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kv,launches", [("f16", 5), ("q8", 5), ("q4", 6)])
def test_a_layer_of_a_decode_step_is_five_launches(simt_library, tmp_path, monkeypatch, kv, launches):
    """Norm with q, k, v and append; attention; output with residual; norm with gate, up and activation; down with residual. A 4-bit
    cache has one more, which quantizes pages."""
    from kvrun.backends import simt

    monkeypatch.setattr(simt, "LIBRARY", simt_library)
    count = ctypes.CDLL(str(simt_library)).kv_simt_launches
    count.restype = ctypes.c_uint64
    taken = []
    for layers in (1, 3):
        folder = random_model(tmp_path / f"tiny-{layers}", 1, layers=layers)
        engine = open_engine(resolve(str(folder)), device="simt", n_ctx=256, kv=kv, threads=1, prefill_chunk=16)
        engine.executor.runs_ahead = False
        before = 0
        for position in range(3):
            engine.sequence.extend(1)
            before = count()
            engine.executor.step(Batch([5], [position], [[t] for t in engine.sequence.tables()], out_rows=[0], sampler=Sampler()))
        taken.append(count() - before)
        engine.close()
    assert (taken[1] - taken[0]) / 2 == launches
    assert taken[0] - launches <= 8, "counters, embedding, rotary table, wanted row, norm, head, two for the draw"



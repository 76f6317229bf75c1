"""Every CUDA kernel against numpy in float64, with fewer rows in the state than the launch was made for."""

import numpy as np
import pytest

from kvrun.backends._abi import ffi

from ..kernels.plans import stored
from ..kernels.test_linear import FORMATS, Matrix

GUARD = np.float32(12345.0)   # what rows above R must still hold afterwards


def pack(weights: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """weights [n][k] in the layout of page.h, and the values that it holds."""
    n, k = weights.shape
    padded = np.zeros((-(-n // 16) * 16, k), np.float32)
    padded[:n] = weights
    if dtype == "f32":
        return padded.reshape(-1, 16, k).transpose(0, 2, 1), weights
    if dtype == "f16":
        bits = padded.astype(np.float16).view(np.uint16)
        held = weights.astype(np.float16).astype(np.float32)
    else:
        bits = (padded.view(np.uint32) >> 16).astype(np.uint16)
        held = (weights.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return bits.reshape(-1, 16, k // 2, 2).transpose(0, 2, 1, 3), held


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_embed(device, rng, dtype):
    n, k, rows = int(rng.integers(1, 100)), 32 * int(rng.integers(1, 30)), int(rng.integers(1, 6))
    weights = rng.standard_normal((n, k), np.float32)
    weights[0, :4] = [0.0, -0.0, 6e-8, 65504.0]           # a subnormal half and the largest one
    packed, held = pack(weights, dtype)
    tokens = [0, *rng.integers(0, n, rows - 1).tolist()]
    out = device.put(np.full((rows + 2, k), GUARD))
    w = {"data": device.put(packed), "dtype": getattr(device.lib, f"KV_{dtype.upper()}"), "n": n, "k": k}
    assert device.step([("embed", {"w": w, "out": out, "scale": 1.5})], device.state(tokens=tokens), max_rows=rows + 2) == 0
    got = device.get(out, np.float32, (rows + 2, k))
    np.testing.assert_array_equal(got[:rows], np.float32(1.5) * held[tokens])
    assert (got[rows:] == GUARD).all()


@pytest.mark.parametrize("accumulate", [0, 1])
@pytest.mark.parametrize("which", ["KV_ROWS_ALL", "KV_ROWS_OUT"])
def test_norm(device, rng, accumulate, which):
    dim, rows = int(rng.integers(1, 2000)), int(rng.integers(2, 6))
    x = rng.standard_normal((rows, dim), np.float32) * 10
    weights, before = rng.standard_normal(dim, np.float32), rng.standard_normal((rows, dim), np.float32)
    out = device.put(before)
    op = {"x": device.put(x), "w": device.put(weights), "out": out, "dim": dim, "rows": getattr(device.lib, which),
          "accumulate": accumulate, "eps": 1e-5, "w_offset": 1.0, "scale": 0.25}
    worked = rows - 1 if which == "KV_ROWS_ALL" else 1
    state = device.state(positions=[0] * (rows - 1), out_rows=[0])
    assert device.step([("norm", op)], state, max_rows=rows, max_out=rows) == 0
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * (weights.astype(np.float64) + 1)
    if accumulate:
        want = before + 0.25 * want
    got = device.get(out, np.float32, (rows, dim))
    np.testing.assert_allclose(got[:worked], want[:worked], rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(got[worked:], before[worked:])


def test_norm_in_place(device, rng):
    x = rng.standard_normal((3, 777), np.float32)
    at = device.put(x)
    op = {"x": at, "w": device.put(np.ones(777, np.float32)), "out": at, "dim": 777, "rows": 0, "accumulate": 0,
          "eps": 0.0, "w_offset": 0.0, "scale": 1.0}
    assert device.step([("norm", op)], device.state(positions=[0, 1, 2]), max_rows=3) == 0
    np.testing.assert_allclose((device.get(at, np.float32, (3, 777)) ** 2).mean(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("kind", ["KV_SILU", "KV_GELU_TANH"])
def test_act(device, rng, kind):
    dim, rows = int(rng.integers(1, 1000)), int(rng.integers(1, 5))
    x = rng.standard_normal((rows, 2 * dim), np.float32) * 4
    x[0, 0] = -200.0                                        # exp(200) overflows float32; the gate is then zero
    out = device.put(np.full((rows + 1, dim), GUARD))
    op = {"x": device.put(x), "out": out, "dim": dim, "kind": getattr(device.lib, kind)}
    assert device.step([("act", op)], device.state(positions=[0] * rows), max_rows=rows + 1) == 0
    gate, up = x[:, :dim].astype(np.float64), x[:, dim:]
    inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    want = (gate / (1 + np.exp(-gate)) if kind == "KV_SILU" else 0.5 * gate * (1 + np.tanh(inner))) * up
    got = device.get(out, np.float32, (rows + 1, dim))
    np.testing.assert_allclose(got[:rows], want, rtol=1e-5, atol=2e-5)
    assert (got[rows:] == GUARD).all()


def test_rope(device, rng):
    half = int(rng.integers(1, 300))
    positions = sorted({0, *rng.integers(0, 131072, 4).tolist()})
    inv_freq = (10000.0 ** -(np.arange(half) / half)).astype(np.float32)
    out = device.put(np.full((len(positions) + 1, 2, half), GUARD))
    op = {"inv_freq": device.put(inv_freq), "out": out, "half": half, "factor": 0.75}
    assert device.step([("rope", op)], device.state(positions=positions), max_rows=len(positions) + 1) == 0
    angle = (np.array(positions, np.float32)[:, None] * inv_freq).astype(np.float64)
    got = device.get(out, np.float32, (len(positions) + 1, 2, half))
    np.testing.assert_allclose(got[:-1], 0.75 * np.stack([np.cos(angle), np.sin(angle)], axis=1), atol=1e-6)
    assert (got[-1] == GUARD).all()


def test_gather(device, rng):
    dim, rows = int(rng.integers(1, 1000)), int(rng.integers(2, 9))
    x = rng.standard_normal((rows, dim), np.float32)
    out_rows = rng.integers(0, rows, int(rng.integers(1, rows + 1))).tolist()
    out = device.put(np.full((rows + 1, dim), GUARD))
    state = device.state(positions=[0] * rows, out_rows=out_rows)
    op = {"x": device.put(x), "out": out, "dim": dim}
    assert device.step([("gather", op)], state, max_rows=rows, max_out=rows + 1) == 0
    got = device.get(out, np.float32, (rows + 1, dim))
    np.testing.assert_array_equal(got[: len(out_rows)], x[out_rows])
    assert (got[len(out_rows) :] == GUARD).all()


def test_ops_run_in_order(device, rng):
    """embed -> norm -> gather, as a plan does it."""
    weights = rng.standard_normal((40, 64), np.float32)
    x, y, z = (device.put(np.zeros((4, 64), np.float32)) for _ in range(3))
    w = {"data": device.put(pack(weights, "f32")[0]), "dtype": device.lib.KV_F32, "n": 40, "k": 64}
    ops = [("embed", {"w": w, "out": x, "scale": 1.0}),
           ("norm", {"x": x, "w": device.put(np.ones(64, np.float32)), "out": y, "dim": 64, "rows": 0, "accumulate": 0,
                     "eps": 0.0, "w_offset": 0.0, "scale": 1.0}),
           ("gather", {"x": y, "out": z, "dim": 64})]
    state = device.state(tokens=[3, 39, 16], out_rows=[2, 1])
    assert device.step(ops, state, max_rows=4, max_out=2) == 0
    want = weights[[16, 39]] / np.sqrt((weights[[16, 39]] ** 2).mean(axis=1, keepdims=True))
    np.testing.assert_allclose(device.get(z, np.float32, (4, 64))[:2], want, rtol=1e-5)


def test_a_plan_is_checked_before_anything_runs(device):
    x, out = device.put(np.ones((1, 32), np.float32)), device.put(np.full((1, 32), GUARD))
    state = device.state(positions=[0], out_rows=[0])
    heads = {"qkv": x, "out": x, "heads": 4, "kv_heads": 2, "head_dim": 60}
    ops = [("gather", {"x": x, "out": out, "dim": 32}), ("attend", heads)]
    assert device.step(ops, state, max_rows=1, max_out=1) == device.lib.KV_UNSUPPORTED
    assert device.error().startswith("op 1 (attend): no CUDA kernel for heads of 60 channels")
    assert (device.get(out, np.float32, (1, 32)) == GUARD).all()
    q4_k = {"data": x, "dtype": device.lib.KV_GGUF_Q4_K, "n": 1, "k": 32}
    assert device.step([("embed", {"w": q4_k, "out": out, "scale": 1.0})], state, max_rows=1) == device.lib.KV_BAD_PLAN
    assert device.step([("gather", {"x": x, "dim": 32})], state, max_rows=1) == device.lib.KV_BAD_PLAN
    assert "null pointer" in device.error()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_unpack(device, rng, dtype):
    n, k = int(rng.integers(18, 70)), 32 * int(rng.integers(1, 5))
    weights = rng.standard_normal((n, k), np.float32)
    packed, _ = pack(weights, "f32")
    w = {"data": ffi.cast("void *", device.put(packed)), "dtype": device.lib.KV_F32, "n": n, "k": k}
    first, rows = int(rng.integers(0, 16)), int(rng.integers(1, n - 16))
    kind = np.uint32 if dtype == "f32" else np.uint16
    out = device.put(np.full((rows + 1, k), 0xABCD, kind))
    code = getattr(device.lib, f"KV_{dtype.upper()}")
    assert device.lib.kv_cuda_unpack(ffi.new("kv_weight *", w), first, rows, ffi.cast("void *", out), code, 0) == 0
    got = device.get(out, kind, (rows + 1, k))
    np.testing.assert_array_equal(got[:rows], stored(weights[first : first + rows], dtype))
    assert (got[rows:] == 0xABCD).all()


@pytest.mark.parametrize("held", FORMATS)
def test_unpack_of_every_format(device, rng, held):
    n, k = int(rng.integers(18, 70)), 32 * int(rng.integers(1, 5))
    matrix = Matrix(rng, held, n, k)
    w = {"data": ffi.cast("void *", device.put(matrix.bytes)), "dtype": matrix.weight.dtype, "n": n, "k": k}
    first, rows = int(rng.integers(0, 16)), int(rng.integers(1, n - 16))
    out = device.put(np.full((rows + 1, k), GUARD))
    assert device.lib.kv_cuda_unpack(ffi.new("kv_weight *", w), first, rows, ffi.cast("void *", out), device.lib.KV_F32, 0) == 0
    got = device.get(out, np.float32, (rows + 1, k))
    np.testing.assert_allclose(got[:rows], matrix.values[first : first + rows], rtol=3e-7, atol=1e-8)
    assert (got[rows:] == GUARD).all()

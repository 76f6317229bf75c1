"""Gated activations against their formulas in float64."""

import numpy as np
import pytest

from kvrun.backends.native import lib

from .plans import floats, pointer, poisoned


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


ACTS = {"silu": (lib.KV_SILU, silu), "gelu_tanh": (lib.KV_GELU_TANH, gelu_tanh)}


def run(machine, x, kind):
    rows, dim = x.shape[0], x.shape[1] // 2
    out = poisoned(rows + 1, dim)
    machine.run([("act", {"x": pointer(x), "out": pointer(out), "dim": dim, "kind": ACTS[kind][0]})], pos=range(rows))
    assert np.isnan(out[rows:]).all()
    return out[:rows]


@pytest.mark.parametrize("kind", ACTS)
@pytest.mark.parametrize("rows, dim", [(1, 1536), (1, 5), (3, 100), (40, 1536), (2, 8192)])
def test_act(machine, rng, kind, rows, dim):
    x = floats(rng, rows, 2 * dim) * 5
    want = ACTS[kind][1](x[:, :dim].astype(np.float64)) * x[:, dim:]
    np.testing.assert_allclose(run(machine, x, kind), want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ACTS)
def test_whole_range(machine, kind):
    gate = np.concatenate([np.linspace(-90, 90, 4001), [0.0, 1e-8, -1e-8, 1e4, -1e4]]).astype(np.float32)
    x = np.stack([gate, np.ones_like(gate)]).reshape(1, -1)
    with np.errstate(over="ignore"):
        want = ACTS[kind][1](gate.astype(np.float64))
    error = np.abs(run(machine, x, kind)[0] - want)
    assert (error <= 1e-5 * np.abs(want) + 1e-6 * np.maximum(1, np.abs(gate)) * (gate < 0) + 1e-30).all()


@pytest.mark.parametrize("kind", ACTS)
def test_nan_stays_nan(machine, rng, kind):
    x = floats(rng, 1, 64)
    x[0, 3], x[0, 32 + 9] = np.nan, np.nan
    assert list(np.flatnonzero(np.isnan(run(machine, x, kind)[0]))) == [3, 9]

"""norm against its formula in float64."""

import numpy as np
import pytest

from kvrun.backends.native import lib

from .plans import floats, pointer, poisoned


def expected(x, w, eps, offset):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * (w.astype(np.float64) + offset)


@pytest.mark.parametrize("rows", [1, 2, 33, 300])
@pytest.mark.parametrize("dim", [1, 15, 16, 40, 576, 640, 1000])
def test_norm(machine, rng, rows, dim):
    x, w, offset, eps = floats(rng, rows, dim) * 10, floats(rng, dim), float(rng.choice([0, 1])), 1e-5
    out = poisoned(rows + 1, dim)
    op = {"x": pointer(x), "w": pointer(w), "out": pointer(out), "dim": dim, "eps": eps, "w_offset": offset, "scale": 77.0}
    machine.run([("norm", op)], pos=range(rows))
    np.testing.assert_allclose(out[:rows], expected(x, w, eps, offset), rtol=1e-5, atol=1e-5)
    assert np.isnan(out[rows:]).all()


@pytest.mark.parametrize("dim", [7, 64, 576])
def test_accumulates_in_place_over_wanted_rows(machine, rng, dim):
    x, w, onto = floats(rng, 5, dim), floats(rng, dim), floats(rng, 3, dim)
    out = onto.copy()
    op = {"x": pointer(x), "w": pointer(w), "out": pointer(out), "dim": dim, "eps": 1e-6, "scale": 0.25, "accumulate": 1,
          "rows": lib.KV_ROWS_OUT}
    machine.run([("norm", op)], pos=range(5), out_row=[4, 1])
    np.testing.assert_allclose(out[:2], onto[:2] + 0.25 * expected(x[:2], w, 1e-6, 0), rtol=1e-5, atol=1e-5)
    assert (out[2:] == onto[2:]).all()


def test_out_may_be_x(machine, rng):
    x, w = floats(rng, 40, 576), floats(rng, 576)
    want = expected(x, w, 1e-5, 0)
    machine.run([("norm", {"x": pointer(x), "w": pointer(w), "out": pointer(x), "dim": 576, "eps": 1e-5})], pos=range(40))
    np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-5)


def test_nan_stays_nan(machine, rng):
    x, w, out = floats(rng, 3, 64), np.ones(64, np.float32), poisoned(3, 64)
    x[1, 5] = np.nan
    machine.run([("norm", {"x": pointer(x), "w": pointer(w), "out": pointer(out), "dim": 64, "eps": 1e-5})], pos=range(3))
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2]]).all()

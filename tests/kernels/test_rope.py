"""The table of cosines and sines."""

import numpy as np
import pytest

from .plans import floats, pointer, poisoned


@pytest.mark.parametrize("half", [1, 16, 32, 48, 64])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_rope(machine, rng, half, rows):
    theta = rng.uniform(1e4, 1e6)
    inv_freq = (theta ** (-np.arange(half) / half)).astype(np.float32)
    pos = np.sort(rng.choice(131072, rows, replace=False)).astype(np.int32)
    out, factor = poisoned(rows + 1, 2, half), float(np.float32(rng.uniform(0.5, 1.5)))
    machine.run([("rope", {"inv_freq": pointer(inv_freq), "out": pointer(out), "half": half, "factor": factor})], pos=pos)
    angle = (pos.astype(np.float32)[:, None] * inv_freq).astype(np.float64)      # the product is taken in float32
    np.testing.assert_allclose(out[:rows, 0], factor * np.cos(angle), atol=3e-7)
    np.testing.assert_allclose(out[:rows, 1], factor * np.sin(angle), atol=3e-7)
    assert np.isnan(out[rows:]).all()


def test_gather(machine, rng):
    x, out = floats(rng, 50, 576), poisoned(21, 576)
    rows = rng.integers(0, 50, 20)
    machine.run([("gather", {"x": pointer(x), "out": pointer(out), "dim": 576})], pos=range(50), out_row=list(rows))
    assert (out[:20] == x[rows]).all() and np.isnan(out[20:]).all()


def test_gather_of_nothing_touches_nothing(machine, rng):
    x, out = floats(rng, 2, 16), poisoned(2, 16)
    machine.run([("gather", {"x": pointer(x), "out": pointer(out), "dim": 16})], pos=range(2))
    assert np.isnan(out).all()

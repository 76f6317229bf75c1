"""--weights: which format every matrix is held in, and that its values are those of the file as far as the format goes."""

from __future__ import annotations

from contextlib import closing

import gguf
import numpy as np
import pytest

from kvrun.backends.native import DTYPES, ffi, lib
from kvrun.backends.plan import Buffer, Op, Plan, Weight
from kvrun.errors import UsageError
from kvrun.hub import resolve
from kvrun.models.spec import TensorRef
from kvrun.runtime import open_engine
from kvrun.weights import load
from kvrun.weights.gguf_file import GgufFile
from kvrun.weights.gguf_source import GgufSource
from kvrun.weights.loaded import LoadedWeights

from ..engine.tiny_model import random_model

K = 256
STORED = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q5_0": "Q5_0", "q4_0": "Q4_0", "q4_1": "Q4_1", "q6_k": "Q6_K", "q3_k": "Q3_K"}
AUTO = {"f32": "f32", "f16": "f16", "bf16": "bf16", "q8_0": "q8", "q5_0": "q8", "q4_0": "q4s", "q4_1": "q4", "q6_k": "q8", "q3_k": "q8"}
WORST = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "q8": 1 / 140, "q4": 0.2, "q4s": 0.0}
"""Largest error of a value, as a share of the largest magnitude of its group; the search for q4 may clip the ends."""


def stored(draw, kind: str, rows: int):
    """Random rows as a GGUF tensor of that kind."""
    values = draw.standard_normal((rows, K)).astype(np.float32)
    which = gguf.GGMLQuantizationType[STORED[kind]]
    if kind == "q3_k":                                     # which the package only reads
        blocks = draw.integers(0, 256, (rows, 110), dtype=np.uint8)
        blocks[:, -2:] = np.full((rows, 1), 0.01, np.float16).view(np.uint8)
        return blocks, which
    if kind == "q6_k":
        blocks = draw.integers(0, 256, (rows, 210), dtype=np.uint8)
        blocks[:, -2:] = np.full((rows, 1), 0.001, np.float16).view(np.uint8)
        return blocks, which
    return gguf.quants.quantize(values, which), which


def one_matrix(source, *names: str) -> tuple[Plan, dict[str, TensorRef]]:
    """A plan that multiplies with the rows of these tensors, one after the other."""
    n = sum(source.info(name)[1][0] for name in names)
    weight = Weight("w", names, n, K)
    op = Op("linear", -1, {"w": weight, "x": Buffer("x", K), "out": Buffer("y", n)})
    return Plan((op,), (), n, 1, 1), {name: TensorRef(name) for name in names}


def held(source, weights: str, *names: str) -> tuple[str, np.ndarray]:
    """The format that the tensors are held in under --weights, and the values that are then multiplied with."""
    plan, refs = one_matrix(source, *names)
    packed = load.layout(plan, source, refs, weights)
    return unpacked(LoadedWeights.read(packed, plan, source, refs, 2), plan)


def unpacked(loaded: LoadedWeights, plan: Plan) -> tuple[str, np.ndarray]:
    """The one matrix' format and values; closes `loaded`."""
    address, dtype = loaded.matrices["w"]
    n = plan.weights[0].n
    target = ffi.new("kv_weight *", {"data": ffi.cast("void *", address), "dtype": DTYPES[dtype], "n": n, "k": K})
    out = np.empty((n, K), np.float32)
    assert lib.kv_unpack(target, 0, n, ffi.cast("float *", ffi.from_buffer(out))) == lib.KV_OK
    loaded.close()
    return dtype, out


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("KVRUN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(draw, write_gguf):
    path = write_gguf({}, {kind: stored(draw, kind, 48) for kind in STORED})
    with closing(GgufFile(path)) as file, closing(GgufSource(file)) as source:
        yield source


@pytest.mark.parametrize("weights", load.WEIGHTS)
@pytest.mark.parametrize("kind", STORED)
def test_one_kind(source, kind, weights):
    order = ["f32", "f16", "bf16", "q8", "q4", "q4s"]
    wanted = AUTO[kind] if weights == "auto" else max(AUTO[kind], weights, key=order.index)
    dtype, got = held(source, weights, kind)
    assert dtype == wanted
    exact = load.as_float32(source.read(kind))
    if dtype == AUTO[kind] and kind not in ("q6_k", "q3_k"):
        np.testing.assert_array_equal(got, exact)
    else:
        error = np.abs(got - exact).reshape(48, -1, 32).max(axis=2)
        assert (error <= WORST[dtype] * np.abs(exact).reshape(48, -1, 32).max(axis=2) * 1.01).all()


@pytest.mark.parametrize("kinds,wanted", [(("q4_0", "q4_0"), "q4s"), (("q4_0", "q4_1"), "q4"), (("q4_0", "q8_0"), "q8"), (("q4_1", "q8_0"), "q8"),
                                          (("q5_0", "q6_k"), "q8"), (("bf16", "q4_1"), "bf16"), (("f16", "bf16"), "f16"), (("f32", "q8_0"), "f32")], ids=str)
def test_mixtures_take_the_widest(source, kinds, wanted):
    dtype, got = held(source, "auto", *kinds)
    assert dtype == wanted
    exact = np.concatenate([load.as_float32(source.read(kind)) for kind in kinds])
    error = np.abs(got - exact).reshape(96, -1, 32).max(axis=2)
    assert (error <= WORST[dtype] * np.abs(exact).reshape(96, -1, 32).max(axis=2) * 1.01).all()


def test_blocks_of_4_bits_side_by_side_are_moved_as_they_are(source):
    """A matrix with minima in one part has them in all; no digit is computed anew."""
    dtype, got = held(source, "auto", "q4_0", "q4_1")
    np.testing.assert_array_equal(got, np.concatenate([load.as_float32(source.read(kind)) for kind in ("q4_0", "q4_1")]))
    plan, refs = one_matrix(source, "q4_0", "q4_1")
    assert dtype == "q4" and not load.requantizes(load.layout(plan, source, refs)[0], source, refs)


@pytest.mark.parametrize("kind", STORED)
def test_random_weights_of_every_format(source, kind):
    """Of variance 1/k, in the format that the file's would have."""
    plan, refs = one_matrix(source, kind)
    dtype, got = unpacked(LoadedWeights.random(load.layout(plan, source, refs), plan), plan)
    assert dtype == AUTO[kind] and 0.8 < got.std() * K**0.5 < 1.2


def test_unknown_name(source):
    plan, refs = one_matrix(source, "f32")
    with pytest.raises(UsageError, match="--weights q5"):
        load.layout(plan, source, refs, "q5")


@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_a_whole_model(tmp_path, weights):
    """Every matrix is quantized, the embedding and the head to 8 bits at least; the reference executor refuses."""
    files = resolve(str(random_model(tmp_path / "tiny", 1)))
    engine = open_engine(files, device="cpu", n_ctx=256, weights=weights)
    list(engine.generate([1, 2, 3], max_tokens=4))
    engine.close()
    from kvrun.blueprint import Blueprint, Shape

    with Blueprint(files, Shape("cpu", weights=weights)) as small, Blueprint(files, Shape("cpu")) as whole:
        assert {p.dtype for p in small.packed if p.weight.name not in ("embed", "head")} == {weights}
        assert {p.dtype for p in small.packed if p.weight.name in ("embed", "head")} == {"q8"}
        assert {p.dtype for p in whole.packed} == {"f32"}
        assert small.weight_bytes < whole.weight_bytes / 3
    with pytest.raises(UsageError, match="reference"):
        open_engine(files, device="reference", n_ctx=256, weights=weights)

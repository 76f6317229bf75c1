"""The GGUF reader against the gguf package's writer, reader and dequantizer."""

from __future__ import annotations

import os
import struct

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrun.errors import ModelError, NotFoundError
from kvrun.weights.gguf_file import GgufArray, GgufFile
from kvrun.weights.gguf_source import GgufSource
from kvrun.weights.source import DTYPES

from .conftest import read_or_refused

FLOATS = {Q.F32: np.float32, Q.F16: np.float16}
QUANTS = [Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ4_NL, Q.IQ4_XS, Q.IQ3_S,
          Q.IQ2_XXS, Q.TQ1_0, Q.TQ2_0, Q.MXFP4, Q.BF16]


def raw(kind: Q, rows: int, cols: int, draw) -> np.ndarray:
    """Random blocks with sane 16-bit scales, as bytes [rows][n]. K-quants have no quantizer in the package."""
    try:
        return gguf.quants.quantize(draw.standard_normal((rows, cols)).astype(np.float32), kind).view(np.uint8)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = draw.integers(0, 256, (rows, cols // block, size), np.uint8)
        scales = draw.uniform(0.01, 0.1, (rows, cols // block, 2)).astype(np.float16).view(np.uint8)
        data[..., :4] = scales.reshape(rows, -1, 4)  # where most kinds keep d and dmin
        data[..., -4:] = scales.reshape(rows, -1, 4)
        return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", QUANTS, ids=lambda k: k.name)
def test_every_kind(kind, write_gguf, draw):
    rows, cols = 5, 512
    data = raw(kind, rows, cols, draw)
    expected = gguf.quants.dequantize(data, kind).reshape(rows, cols)
    source = GgufSource(GgufFile(write_gguf({}, {"a": (data, kind), "b": np.ones(3, np.float32)})))
    dtype, shape = source.info("a")
    assert shape == (rows, cols) and dtype in DTYPES and source.stored("a") == kind.name
    for start, stop in ((0, None), (1, 4), (4, 5)):
        got = source.read("a", start, stop)
        assert got.dtype == dtype and got.shape == ((stop or rows) - start, cols)
        if dtype == "f32":
            np.testing.assert_array_equal(np.frombuffer(got.data, np.float32).reshape(got.shape), expected[start:stop])
        else:
            assert dtype == kind.name.lower() and bytes(got.data) == data[start:stop].tobytes()
    source.close()


def test_floats_and_row_major_shapes(write_gguf, draw):
    a, b, c = (draw.standard_normal(s).astype(t) for s, t in (((7, 3), "f4"), ((2, 3, 4), "f2"), ((9,), "f4")))
    source = GgufSource(GgufFile(write_gguf({}, {"a": a, "b": b, "c": c})))
    assert source.names() == ["a", "b", "c"]
    for name, array, kind in (("a", a, "f32"), ("b", b, "f16"), ("c", c, "f32")):
        assert source.info(name) == (kind, array.shape)
        for start in range(array.shape[0]):
            assert bytes(source.read(name, start).data) == array[start:].tobytes()
    for start, stop in ((-1, 2), (2, 2), (0, 8), (5, 3)):
        with pytest.raises(ModelError):
            source.read("a", start, stop)
    with pytest.raises(ModelError, match="'d' is missing"):
        source.info("d")


def test_a_large_tensor_is_dequantized_in_pieces(write_gguf, draw):
    data = raw(Q.Q3_K, 64, 1 << 17, draw)  # twice what is dequantized at a time
    source = GgufSource(GgufFile(write_gguf({}, {"a": (data, Q.Q3_K)})))
    got = np.frombuffer(source.read("a").data, np.float32).reshape(64, -1)
    np.testing.assert_array_equal(got, gguf.quants.dequantize(data, Q.Q3_K).reshape(64, -1))


def test_integers_are_no_weights(write_gguf):
    source = GgufSource(GgufFile(write_gguf({}, {"a": np.ones((2, 2), np.int32), "b": np.ones(2, np.float32)})))
    with pytest.raises(ModelError, match="'a' is i32"):
        source.info("a")
    assert source.info("b") == ("f32", (2,))


def test_metadata(write_gguf):
    words = ["", "a", "héllo", "\n", "<|x|>"] * 50
    meta = {"s": "text", "i": 7, "f": 0.5, "t": True, "n": False, "words": words, "ints": [3, -1, 2], "reals": [0.5, 1.5],
            "flags": [True, False]}
    got = GgufFile(write_gguf(meta, {"a": np.ones(2, np.float32)})).metadata
    for key, value in meta.items():
        assert (list(got[key]) if isinstance(value, list) else got[key]) == value, key
    assert isinstance(got["words"], GgufArray) and len(got["words"]) == 250
    assert got["words"][2] == "héllo" and got["words"][-1] == "<|x|>" and got["words"][1:3] == ["a", "héllo"]


def test_a_real_file_as_the_package_reads_it(smollm2):
    theirs, ours = gguf.GGUFReader(smollm2.path), smollm2.gguf
    assert {t.name: (tuple(int(n) for n in reversed(t.shape)), t.data_offset, t.n_bytes, t.tensor_type) for t in theirs.tensors} \
        == {t.name: (t.shape, t.offset, t.n_bytes, t.type) for t in ours.tensors.values()}
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = ours.metadata[key]
            assert (list(value) if isinstance(value, GgufArray) else value) == field.contents(), key


def test_metadata_outlives_the_descriptor(write_gguf):
    file = GgufFile(write_gguf({"words": ["a", "b"]}, {"a": np.ones(2, np.float32)}))
    source = GgufSource(file)
    file.close()
    assert list(file.metadata["words"]) == ["a", "b"] and bytes(source.read("a").data) == np.ones(2, np.float32).tobytes()
    source.close()
    source.close()


def test_cut_short_while_open(write_gguf):
    path = write_gguf({}, {"a": np.ones((8, 1024), np.float32)})
    source = GgufSource(GgufFile(path, "kvrun pull x"))
    os.truncate(path, path.stat().st_size - 4096)
    with pytest.raises(ModelError, match="cut short.*kvrun pull x"):
        source.read("a")
    assert source.read("a", 0, 2).shape == (2, 1024)


def test_not_a_whole_gguf_file(write_gguf, tmp_path):
    good = write_gguf({"x": 1, "words": ["a"] * 9}, {"a": np.ones((4, 8), np.float32)}).read_bytes()
    path = tmp_path / "x.gguf"

    def refused(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(ModelError) as e:
            GgufFile(path, "kvrun pull x")
        assert str(path) in str(e.value) and "\n" not in str(e.value)
        return str(e.value)

    for size in (0, 3, 4, 20, 60, len(good) // 2, len(good) - 1):
        assert "kvrun pull x" in refused(good[:size])
    assert "git-LFS" in refused(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "not a GGUF" in refused(b"GGML" + good[4:])
    assert "version 99" in refused(good[:4] + struct.pack("<I", 99) + good[8:])
    assert "big-endian" in refused(good[:4] + struct.pack(">I", 3) + good[8:])
    assert "tensors" in refused(good[:8] + struct.pack("<Q", 1 << 60) + good[16:])
    assert "keys" in refused(good[:16] + struct.pack("<Q", 1 << 60) + good[24:])
    with pytest.raises(NotFoundError):
        GgufFile(tmp_path / "none.gguf")


def test_parts_of_a_split_file_are_refused(write_gguf):
    with pytest.raises(ModelError, match="join them"):
        GgufFile(write_gguf({"split.count": 3, "split.no": 0}, {"a": np.ones(2, np.float32)}))


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_a_model_error_within_bounds(data, write_gguf, tmp_path):
    """Whatever bytes a header holds: a ModelError or a file that reads, and memory of the order of the file."""
    path = tmp_path / "damaged.gguf"
    good = tmp_path / "good.gguf"
    if not good.exists():
        write_gguf({"words": [f"w{i}" for i in range(40)], "ints": list(range(9)), "f": 1.0, "s": "text"},
                   {"a": np.ones((4, 64), np.float32), "b": (np.zeros((2, 18), np.uint8), Q.Q4_0)}, name="good.gguf")
    content = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, min(len(content) - 9, 1200))))
        what = data.draw(st.sampled_from(["byte", "u64", "cut", "insert"]))
        if what == "byte":
            content[at] = data.draw(st.integers(0, 255))
        elif what == "u64":
            content[at:at + 8] = struct.pack("<Q", data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1])))
        elif what == "cut":
            del content[at + 8:]
        else:
            content[at:at] = data.draw(st.binary(min_size=1, max_size=16))
    path.write_bytes(content)
    with read_or_refused(16 << 20):
        file = GgufFile(path)
        source = GgufSource(file)
        for value in file.metadata.values():
            if isinstance(value, GgufArray):
                list(value)
        for name in source.names():
            source.read(name)
        source.close()

"""Safetensors folders: reading, and everything that can be wrong with one."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kvrun.errors import ModelError
from kvrun.hub.folder import open_folder
from kvrun.weights.folder import FolderSource

from .conftest import read_or_refused

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def as_bytes(t: torch.Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def sharded(tmp_path):
    """A folder with three shards and an index; gives (folder, tensors)."""
    tensors = {f"t{i}": torch.randn(4 + i, 8) for i in range(6)}
    weight_map = {}
    for i in range(3):
        names = list(tensors)[i::3]
        shard = f"model-0000{i + 1}-of-00003.safetensors"
        save_file({n: tensors[n] for n in names}, tmp_path / shard)
        weight_map |= dict.fromkeys(names, shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path, tensors


def test_kinds_and_rows(tmp_path):
    tensors = {n: torch.randn(6, 5).to(t) for n, t in DTYPES.items()} | {"scalar": torch.tensor(2.0), "v": torch.randn(7)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = FolderSource(tmp_path)
    assert sorted(source.names()) == sorted(tensors)
    for name in DTYPES:
        assert source.info(name) == (name, (6, 5)) and source.stored(name) == name.upper()
        for start, stop in ((0, None), (0, 1), (2, 5), (5, 6)):
            got = source.read(name, start, stop)
            assert got.dtype == name and bytes(got.data) == as_bytes(tensors[name][start:stop])
            assert got.shape == tuple(tensors[name][start:stop].shape)
    assert source.read("scalar").shape == () and bytes(source.read("v", 3).data) == as_bytes(tensors["v"][3:])
    for start, stop in ((-1, None), (3, 3), (0, 7), (6, None)):
        with pytest.raises(ModelError):
            source.read("f32", start, stop)
    with pytest.raises(ModelError, match="'none' is missing"):
        source.info("none")
    source.close()
    source.close()


def test_shards(sharded):
    folder, tensors = sharded
    source = FolderSource(folder)
    assert source.names() == list(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])
    for name, tensor in tensors.items():
        assert bytes(source.read(name).data) == as_bytes(tensor)


def test_other_dtypes_are_refused_by_name_when_asked_for(tmp_path):
    save_file({"ids": torch.arange(4), "w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    source = FolderSource(tmp_path)
    assert source.info("w") == ("f32", (2, 2))
    with pytest.raises(ModelError, match="'ids' is I64"):
        source.info("ids")


@pytest.mark.parametrize("shard", ["../model-00002-of-00003.safetensors", "/etc/passwd", "x/y.safetensors", "..", "",
                                   "pytorch_model.bin", ".safetensors", "a\0.safetensors", 7, None, ["x"]])
def test_an_index_that_leads_elsewhere(sharded, shard):
    folder, _ = sharded
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["t1"] = shard
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match="index.json"):
        FolderSource(folder)


def test_an_index_that_is_wrong(sharded):
    folder, _ = sharded
    path = folder / "model.safetensors.index.json"
    good = json.loads(path.read_text())
    lost = good["weight_map"] | {"t9": "model-00002-of-00003.safetensors"}
    for text, says in (("{", "not valid JSON"), ("[]", "not a JSON object"), ("{}", "weight_map"),
                       ('{"weight_map": []}', "weight_map"), (json.dumps({"weight_map": lost}), "'t9'"),
                       ("[" * 100000, "not valid JSON"), ("version https://git-lfs.github.com/spec/v1\n", "git-LFS")):
        path.write_text(text)
        with pytest.raises(ModelError, match=says):
            FolderSource(folder)


def test_a_missing_shard_is_found_before_anything_is_read(sharded):
    folder, _ = sharded
    (folder / "model-00003-of-00003.safetensors").unlink()
    (folder / "model-00001-of-00003.safetensors").write_bytes(b"broken too")
    with pytest.raises(ModelError, match="'model-00003-of-00003.safetensors' is missing; kvrun pull x"):
        FolderSource(folder, "kvrun pull x")


def header(entries: dict, data: bytes, length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("content", [
    b"", b"1234567", struct.pack("<Q", 0), struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 200_000_000) + b"{}",
    header({"a": ONE}, b""), header({"a": ONE}, bytes(7)), header({"a": ONE}, bytes(9)),
    header({"a": ONE, "b": ONE}, bytes(8)),                                                    # overlap
    header({"a": ONE, "b": ONE | {"data_offsets": [12, 20]}}, bytes(20)),                      # hole
    header({"a": ONE | {"shape": [3]}}, bytes(8)), header({"a": ONE | {"data_offsets": [8, 0]}}, bytes(8)),
    header({"a": ONE | {"shape": [2**63, 4]}}, bytes(8)), header({"a": ONE | {"dtype": "X9"}}, bytes(8)),
    header({"a": ONE | {"data_offsets": [-8, 0]}}, bytes(8)), header({"a": 3}, bytes(8)), header({"a": ONE}, bytes(8), 5),
    struct.pack("<Q", 3) + b"\xff\xfe\xfd",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 268435456\n",
])
def test_damaged_files(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError) as e:
        FolderSource(tmp_path, "kvrun pull x")
    assert str(path) in str(e.value) and "kvrun pull x" in str(e.value) and "\n" not in str(e.value)
    assert ("git-LFS" in str(e.value)) == content.startswith(b"version")


def test_cut_short_while_open(tmp_path):
    save_file({"a": torch.randn(64, 64)}, tmp_path / "model.safetensors")
    source = FolderSource(tmp_path, "kvrun pull x")
    os.truncate(tmp_path / "model.safetensors", 4096)
    with pytest.raises(ModelError, match="cut short.*kvrun pull x"):
        source.read("a")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_a_model_error_within_bounds(data, tmp_path):
    entries = {f"t{i}": {"dtype": "F32", "shape": [2, 4], "data_offsets": [32 * i, 32 * i + 32]} for i in range(3)}
    content = bytearray(header(entries, bytes(96)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 9))
        if data.draw(st.booleans()):
            content[at] = data.draw(st.integers(0, 255))
        else:
            content[at:at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    (tmp_path / "model.safetensors").write_bytes(content)
    with read_or_refused(16 << 20):
        source = FolderSource(tmp_path)
        for name in source.names():
            source.read(name)
        source.close()


def test_folders_that_are_no_models(tmp_path):
    def refused(says: str) -> None:
        with pytest.raises(ModelError, match=says):
            open_folder(tmp_path, "x")

    refused("no config.json")
    (tmp_path / "config.json").write_text("{}")
    refused("no \\*.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused("pickled")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert open_folder(tmp_path, "x").kind == "folder"
    for text, says in (("", "not valid JSON"), ("[1]", "not a JSON object"), ("version https://git-lfs.github.com/spec/v1", "git-LFS"),
                       ('{"a": "' + "x" * (17 << 20) + '"}', "16 MiB")):
        (tmp_path / "config.json").write_text(text)
        refused(says)


def test_nan_and_inf_are_found(tmp_path):
    from kvrun.hub.verify import verify

    (tmp_path / "config.json").write_text("{}")
    for kind in DTYPES.values():
        for bad in (float("nan"), float("inf"), -float("inf"), None):
            t = torch.randn(300, 64).to(kind)
            if bad is not None:
                t[np.random.default_rng().integers(300), 7] = bad
            save_file({"fine": torch.ones(3), "w": t}, tmp_path / "model.safetensors")
            files = open_folder(tmp_path, "x")
            if bad is None:
                assert [c.checksum for c in verify(files)] == ["none", "none"]
            else:
                with pytest.raises(ModelError, match="'w' holds NaN or Inf"):
                    verify(files)

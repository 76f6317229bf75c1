"""Rows 1 to 6: weight files that are broken, lie, or change while they are read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from ..cli.conftest import KVRUN
from ..engine.tiny_model import random_model
from ..hub.conftest import add
from .conftest import check, publish

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def header(entries: dict, data: bytes, length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize("content", [
    b"", header({"a": ONE}, bytes(7)), struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 200_000_000) + b"{}",
    header({"a": ONE, "b": ONE}, bytes(8)), header({"a": ONE, "b": ONE | {"data_offsets": [12, 20]}}, bytes(20)),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 268435456\n",
], ids=["empty", "cut", "header past the end", "header too large", "overlap", "hole", "git-LFS pointer"])
def test_row_01_a_weight_file_that_is_broken(kvrun, copy, content):
    folder = copy()
    (folder / "model.safetensors").write_bytes(content)
    line = check(kvrun("run", folder, "x"), 5, f"{folder}/model.safetensors", "fetch it again")
    assert ("git-LFS" in line) == content.startswith(b"version")
    if not content:
        for command in ("verify", "show", "plan"):
            check(kvrun(command, folder), 5, "model.safetensors")


def test_row_01_a_truncated_shard_names_the_command_that_mends_it(hub, online, tmp_path, scripted):
    repo = publish(hub, scripted)
    assert online("pull", "org/model", "-q").returncode == 0
    content = repo.trees[repo.revisions["main"]]["model.safetensors"]
    (blob,) = (p for p in (tmp_path / "home/hf/hub/models--org--model/blobs").iterdir() if p.stat().st_size == len(content))
    blob.write_bytes(content[:-100])
    check(online("run", "org/model", "x"), 5, "model.safetensors", "kvrun pull org/model")
    assert online("pull", "org/model", "-q").returncode == 0
    assert online("run", "org/model", "x").stdout == "Größe,\nWelt\n"


def test_row_01_a_truncated_gguf(online, machine, tiny_gguf):
    path = machine.home / "cut.gguf"
    for size in (len(tiny_gguf) - 50, 2000, 20, 3, 0):
        path.write_bytes(tiny_gguf[:size])
        check(online("run", path, "x"), 5, str(path))


def test_row_02_a_zeroed_region_of_the_right_size(hub, machine, online):
    repo = add(hub)
    content = repo.trees[repo.revisions["main"]]["model.safetensors"]
    zeroed = content[:2048] + bytes(512) + content[2560:]
    hub.swapped["model.safetensors"] = zeroed
    check(online("pull", "org/tiny", "-q"), 5, "model.safetensors", "kvrun pull org/tiny")
    check(online("run", "org/tiny", "x", "--offline"), 3, "kvrun pull org/tiny")      # it was not kept
    hub.swapped.clear()
    assert online("pull", "org/tiny").returncode == 0
    blob = machine.home / "hf/hub/models--org--tiny/blobs" / hashlib.sha256(content).hexdigest()
    blob.write_bytes(zeroed)
    check(online("verify", "org/tiny", "-q"), 5, "model.safetensors", "kvrun pull org/tiny")
    assert online("pull", "org/tiny").returncode == 0
    assert online("verify", "org/tiny").returncode == 0 and blob.read_bytes() == content


def poisoned(folder, name: str, rows=slice(None)) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].copy()
    tensors[name][rows] = np.nan
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("sampling", [["--temp", "0"], ["--temp", "1", "--seed", "1"], ["--temp", "1", "--top-k", "5", "--json"]])
def test_row_03_nan_logits_are_never_drawn_from(kvrun, copy, device, sampling):
    folder = copy()
    poisoned(folder, "lm_head.weight")
    check(kvrun("run", folder, "x", "--device", device, *sampling), 8, "NaN")


def test_row_03_nan_in_the_middle_of_an_answer(kvrun, copy):
    """The second token of the answer has a NaN in its embedding: the first is said, and then it ends."""
    folder = copy()
    poisoned(folder, "model.embed_tokens.weight", 257)
    for sampling in ("0", "1"):
        result = kvrun("run", folder, "x", "--temp", sampling, "--seed", "3")
        assert result.returncode == 8 and result.stdout.startswith(b"Gr") and b"Welt" not in result.stdout
        assert b"NaN" in result.stderr and result.stderr.count(b"\n") == 1


def test_row_03_nan_in_the_weights_under_verify(kvrun, copy):
    folder = copy()
    assert kvrun("verify", folder).returncode == 0
    poisoned(folder, "model.layers.0.mlp.up_proj.weight", (3, 5))
    check(kvrun("verify", folder, "-q"), 5, "'model.layers.0.mlp.up_proj.weight' holds NaN or Inf")


RACE = """
import sys
from pathlib import Path
from kvrun.errors import ModelError
from kvrun.weights.folder import FolderSource
opened = refused = 0
while opened + refused < 60000 and (opened < 300 or refused < 300):
    try:
        source = FolderSource(Path(sys.argv[1]))
        opened += 1
    except ModelError:
        refused += 1
        continue
    try:
        source.read("lm_head.weight")
    except ModelError:
        pass
    source.close()
print(opened, refused)
"""


def test_row_04_a_weight_file_cut_while_it_is_read_is_no_bus_error(environment, copy):
    """It is cut and made whole again as fast as it goes, while another process opens and reads it hundreds of times."""
    folder = copy()
    path = folder / "model.safetensors"
    content = path.read_bytes()
    reader = subprocess.Popen([sys.executable, "-c", RACE, str(folder)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    done = threading.Event()
    threading.Thread(target=lambda: (reader.wait(), done.set()), daemon=True).start()
    while not done.is_set():
        os.truncate(path, 0)
        os.truncate(path, len(content))
        with open(path, "r+b") as file:
            file.write(content[:1 << 16])
    out, err = reader.communicate()
    assert reader.returncode == 0, (reader.returncode, err)
    opened, refused = map(int, out.split())
    assert opened > 20 and refused > 20, "the race was never on"


def test_row_04_a_weight_file_cut_while_an_answer_is_given(environment, endless, tmp_path):
    """What was loaded is not read from the file again."""
    folder = shutil.copytree(endless, tmp_path / "m")
    process = subprocess.Popen([*KVRUN, "run", str(folder), "x", "-n", "4096", "--max-tokens", "1500"], stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=environment)
    assert process.stdout.readline() == b"line 100\n"
    os.truncate(folder / "model.safetensors", 0)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err, out.count(b"\n")) == (0, b"", 1499)


@pytest.mark.parametrize("shard", ["../model-00002-of-00002.safetensors", "/etc/passwd", "absent.safetensors"])
def test_row_05_an_index_that_leads_elsewhere(kvrun, scripted, tmp_path, shard):
    """Before any allocation: with a context that no machine holds, it is still the index that is refused."""
    folder = tmp_path / "m"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((scripted / name).read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 30}))
    tensors = load_file(scripted / "model.safetensors")
    (folder / "model-00001-of-00002.safetensors").write_bytes(save({"lm_head.weight": tensors.pop("lm_head.weight")}))
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(save(tensors))
    index = {"weight_map": dict.fromkeys(tensors, shard) | {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check(kvrun("run", folder, "x", "-n", "1000000000"), 5, "model.safetensors.index.json", repr(shard))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.0.self_attn.k_proj.weight"])
@pytest.mark.parametrize("harm", ["missing", "misshapen"])
def test_row_06_a_missing_or_misshapen_tensor(kvrun, copy, name, harm):
    folder = copy()
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors.pop(name)
    if harm == "misshapen":
        tensors[name] = np.ascontiguousarray(tensor[:-1])
    save_file(tensors, folder / "model.safetensors")
    check(kvrun("run", folder, "x"), 5, str(folder), f"'{name}'", "missing" if harm == "missing" else "has shape")


def test_row_06_a_layer_too_many_is_refused_too(kvrun, tmp_path):
    folder = random_model(tmp_path / "m", 3, layers=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    check(kvrun("run", folder, "x"), 5, str(folder), "model.layers.1.")

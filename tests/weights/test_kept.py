"""Packed weights kept on disk: made once, read back to the byte, made anew when they do not fit, done without where they cannot be."""

from __future__ import annotations

import os
import shutil
import threading

import numpy as np
import pytest

from kvrun.blueprint import Blueprint, Shape
from kvrun.errors import UsageError
from kvrun.hub import resolve
from kvrun.hub.store import packed_dir
from kvrun.weights import kept, load
from kvrun.weights.loaded import LoadedWeights

from ..engine.tiny_model import random_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small float32 model, and a store of its own."""
    monkeypatch.setenv("KVRUN_CACHE", str(tmp_path / "cache"))
    return random_model(tmp_path / "tiny", 1)


@pytest.fixture
def packings(monkeypatch):
    """How often matrices were packed."""
    calls, pack = [], load.pack

    def counted(*arguments, **named):
        calls.append(1)
        return pack(*arguments, **named)

    monkeypatch.setattr(load, "pack", counted)
    return calls


def read(folder, weights: str = "q4", threads: int = 2) -> tuple[bytes, list[str]]:
    """(the packed bytes, what the user was told)"""
    told = []
    with Blueprint(resolve(str(folder)), Shape("cpu", weights=weights)) as blueprint:
        loaded = LoadedWeights.read(blueprint.packed, blueprint.plan(256), blueprint.source, blueprint.refs, threads, notify=told.append)
        data = loaded.packed_bytes.tobytes()
        loaded.close()
    return data, told


def files() -> list:
    return sorted(packed_dir().iterdir()) if packed_dir().exists() else []


@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_packed_once(folder, packings, weights):
    first = read(folder, weights)
    assert len(packings) == 1 and len(files()) == 1 and first[1] == []
    for threads in (1, 3):
        assert read(folder, weights, threads) == first
    assert len(packings) == 1


def test_what_is_only_moved_is_not_kept(folder, packings):
    for weights in ("auto", "bf16"):
        read(folder, weights)
    assert len(packings) == 2 and files() == []


def test_each_format_has_its_own(folder, packings):
    q8, q4 = read(folder, "q8"), read(folder, "q4")
    assert len(files()) == 2 and read(folder, "q8") == q8 and read(folder, "q4") == q4 and len(packings) == 2


@pytest.mark.parametrize("damage", ["cut short", "longer", "empty", "zeroed data", "zeroed header", "another version"])
def test_a_bad_file_is_made_anew(folder, packings, damage):
    want = read(folder)
    (path,) = files()
    raw = bytearray(path.read_bytes())
    if damage == "another version":
        raw[8] ^= 1                                        # of the key, in which the version is hashed
    elif damage == "zeroed data":
        raw[4096:] = bytes(len(raw) - 4096)
    elif damage == "zeroed header":
        raw[:4096] = bytes(4096)
    path.write_bytes({"cut short": raw[:-1], "longer": raw + b"x", "empty": b""}.get(damage, bytes(raw)))
    assert read(folder) == want and len(packings) == 2
    assert read(folder) == want and len(packings) == 2 and len(files()) == 1


def test_other_weights_at_the_same_place(folder, packings, tmp_path):
    read(folder)
    shutil.copy(random_model(tmp_path / "other", 2) / "model.safetensors", folder / "model.safetensors")
    changed = read(folder)
    assert len(packings) == 2 and len(files()) == 1        # the stale file was replaced
    fresh = read(tmp_path / "other")
    assert changed[0] == fresh[0]


def test_a_file_touched_in_one_place(folder, packings):
    """Also where the change lies between the samples: the time of change tells."""
    before = read(folder)
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-40000:-39000] = np.full(250, 0.5, np.float32).tobytes()
    path.write_bytes(raw)
    assert read(folder) != before and len(packings) == 2


def test_a_folder_that_cannot_be_written(folder, packings):
    cache = packed_dir().parent
    cache.mkdir(parents=True)
    packed_dir().write_text("a file is in the way, which stops root too")
    data, told = read(folder)
    assert len(told) == 1 and str(packed_dir()) in told[0] and "\n" not in told[0]
    packed_dir().unlink()
    assert read(folder) == (data, [])


def test_a_full_disk(folder, packings, monkeypatch):
    def full(fd, offset, length):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    data, told = read(folder)
    assert len(told) == 1 and "No space left" in told[0] and files() == []
    monkeypatch.undo()


def test_two_at_once(folder):
    """Both pack, or one finds what the other kept: the same bytes either way, and one file."""
    results = []
    workers = [threading.Thread(target=lambda: results.append(read(folder, threads=1))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 3 and all(r == results[0] for r in results) and len(files()) == 1


def test_rm_takes_what_is_kept_of_a_model_and_leaves_its_own_files(folder, packings, tmp_path):
    from kvrun.hub.pull import removals, remove

    for each in (folder, random_model(tmp_path / "other", 2)):
        read(each, "q8")
        read(each, "q4")
    found = removals(str(folder))
    assert len(found) == 2 and all(r.n_bytes == r.path.stat().st_size > 4096 for r in found)
    for removal in found:
        remove(removal)
    assert len(files()) == 2 and (folder / "model.safetensors").exists()
    with pytest.raises(UsageError, match="did not fetch it"):
        removals(str(folder))
    assert len(removals(str(tmp_path / "other"))) == 2

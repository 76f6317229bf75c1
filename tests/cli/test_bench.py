"""Measuring: what is counted is right, whatever the times are."""

import json
import shutil

import pytest

from kvrun.blueprint import Blueprint, Shape
from kvrun.cache.formats import KV_CHOICES
from kvrun.hub import resolve
from kvrun.measure.speed import measure
from kvrun.measure.tracks import Model

from ..engine.tiny_model import random_model
from .test_errors import check

pytest.importorskip("kvrun.backends.native", exc_type=Exception)

KEYS = ["kv", "depth", "prefill_tokens_per_second", "ms_per_token", "tokens_per_second", "bytes_moved", "bandwidth_share",
        "no_cache_ms_per_token"]
LAYER = 2 * 2 * 32 * 2                                                     # bytes a token of a layer's K and V in 16 bits
LINEARS = 4 * (3 * ((4 + 2 * 2) * 32 * 64 + 4 * 32 * 64 + 3 * 96 * 64) + 272 * 64)  # the head's 259 rows padded to 272


@pytest.fixture
def shape_only(random_folder, tmp_path):
    shutil.copy(random_folder / "config.json", tmp_path)
    return tmp_path


def bench(kvrun, *args):
    result = kvrun("bench", *args, "--repeat", "1", "--json")
    assert (result.returncode, result.stderr) == (0, b""), result.stderr
    return json.loads(result.stdout)


def test_json(kvrun, random_folder):
    said = bench(kvrun, random_folder, "--kv", "f16,f32", "--depth", "300,0", "--threads", "2")
    assert [list(row) for row in said["rows"]] == [KEYS] * 4
    assert [(row["depth"], row["kv"]) for row in said["rows"]] == [(0, "f16"), (0, "f32"), (300, "f16"), (300, "f32")]
    assert said["threads"] == 2 and not said["random_weights"] and said["read_bytes_per_second"] > 1e8
    for row in said["rows"]:
        width = {"f16": 1, "f32": 2}[row["kv"]] * 3 * LAYER
        assert row["bytes_moved"] == LINEARS + (row["depth"] + 3 + 1) * width   # read in the mean of four steps behind one, and written
        assert row["tokens_per_second"] == pytest.approx(1000 / row["ms_per_token"])
        assert row["bandwidth_share"] == pytest.approx(row["bytes_moved"] / row["ms_per_token"] * 1000 / said["read_bytes_per_second"])
        assert row["prefill_tokens_per_second"] > 0 and row["no_cache_ms_per_token"] is None


def test_random_weights_of_a_shape(kvrun, random_folder, shape_only):
    said = bench(kvrun, shape_only, "--depth", "10")
    assert said["random_weights"] and said["rows"][0]["bytes_moved"] == LINEARS + 14 * 3 * LAYER
    assert bench(kvrun, random_folder, "--random", "--depth", "0")["random_weights"]


def test_random_weights_in_every_format_give_finite_logits(smollm2, gemma3):
    for files in (smollm2, gemma3):
        with Blueprint(files, Shape("cpu")) as blueprint:
            kinds = {p.dtype for p in blueprint.packed}
            with Model(blueprint, 64, ["f16"], random=True) as model:
                assert model.weights.n_bytes == blueprint.weight_bytes and {dtype for _, dtype in model.weights.matrices.values()} == kinds
                track = model.tracks[0]
                track.prefill(range(20))
                seen = {track.decode(token) for token in range(20, 40)}  # raises for logits that are not finite
                assert len(seen) > 1


def test_without_a_cache_every_token_costs_its_prefix(kvrun, random_folder):
    row, = bench(kvrun, random_folder, "--depth", "1000", "--no-cache")["rows"]
    assert row["no_cache_ms_per_token"] > 0
    with Blueprint(resolve(str(random_folder)), Shape("cpu", threads=1)) as blueprint:
        with Model(blueprint, 600, ["f32"]) as model:
            track = model.tracks[0]
            for _ in measure(model, [50], bandwidth=None, repeat=2, no_cache=False):
                cached = track.executor.appended
            track.rewind(0)
            for _ in measure(model, [50], bandwidth=None, repeat=2, no_cache=True):
                pass
            # two prefixes of 51 tokens more, in 3 layers
            assert track.executor.appended - 2 * cached == 2 * 51 * 3 and track.length == 50


@pytest.mark.parametrize("kv", KV_CHOICES)
def test_depths_beyond_the_window(tmp_path, kv):
    """Rewinding in a sliding group finds its pages, at every depth."""
    with Blueprint(resolve(str(random_model(tmp_path, 7, window=40))), Shape("cpu", threads=1, prefill_chunk=256)) as blueprint:
        with Model(blueprint, 1700 + 256, [kv], rewinds=256) as model:
            for at, found in zip((130, 1000, 1700), measure(model, [1700, 130, 1000], bandwidth=1e9, repeat=3, no_cache=False), strict=True):
                assert [s.depth for s in found] == [at] and model.tracks[0].length == at
                # three layers read their window and write one token
                moved = found[0].bytes_moved - blueprint.read_bytes
                assert moved == pytest.approx(41 * model.tracks[0].pool.groups[0].page_stride / 128, abs=1)


def test_for_people(kvrun, random_folder):
    result = kvrun("bench", random_folder, "--depth", "0,200", "--repeat", "1", "--no-cache")
    out = result.stdout.decode().splitlines()
    assert (result.returncode, result.stderr) == (0, b"")
    assert "memory read at" in out[0] and "no cache ms" in out[2] and len(out) == 5 and out[4].split()[:2] == ["f16", "200"]


def test_depths_beyond_the_trained_length_are_left_out(kvrun, shape_only):
    config = json.loads((shape_only / "config.json").read_text())
    (shape_only / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1000}))
    result = kvrun("bench", shape_only, "--repeat", "1", "--json")
    assert result.stderr == b"" and [row["depth"] for row in json.loads(result.stdout)["rows"]] == [0]
    check(kvrun("bench", shape_only, "--depth", "1001"), 2, "1001", "1000 positions")


def test_bad_input(kvrun, random_folder, tmp_path):
    check(kvrun("bench", random_folder, "--depth", "deep"), 2, "--depth deep")
    check(kvrun("bench", random_folder, "--depth", "-1"), 2, "negative")
    check(kvrun("bench", random_folder, "--kv", "q3"), 2, "q3", *KV_CHOICES)
    check(kvrun("bench", random_folder, "--repeat", "0"), 2, "--repeat")
    check(kvrun("bench", random_folder, "--random", "--device", "reference"), 2, "--device cpu")
    check(kvrun("bench", tmp_path), 5, "config.json")

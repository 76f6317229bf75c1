"""What a model takes is said before it is loaded, and is what it takes."""

import json
import shutil

import pytest

from kvrun.blueprint import Blueprint, Shape
from kvrun.cache.formats import KV_CHOICES
from kvrun.cache.planner import available_memory
from kvrun.errors import OutOfMemoryError
from kvrun.hub import resolve
from kvrun.measure.tracks import Model

from ..engine.tiny_model import random_model
from .test_errors import check


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    """A Mistral that sees 40 positions."""
    return random_model(tmp_path_factory.mktemp("sliding"), 6, window=40)


@pytest.fixture
def shape_only(random_folder, tmp_path):
    shutil.copy(random_folder / "config.json", tmp_path)
    return tmp_path


def large(folder, **changes):
    """A model of about 8e9 parameters that is nothing but its config.json."""
    config = json.loads((folder / "config.json").read_text()) | {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "torch_dtype": "bfloat16", "max_position_embeddings": 131072} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plan(kvrun, *args):
    result = kvrun("plan", *args, "--json")
    assert (result.returncode, result.stderr) == (0, b""), result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("kv", KV_CHOICES)
@pytest.mark.parametrize("n_ctx", [1, 100, 700, 2048])
@pytest.mark.parametrize("which", ["random_folder", "sliding"])
def test_planned_bytes_are_allocated_bytes(request, which, n_ctx, kv):
    pytest.importorskip("kvrun.backends.native", exc_type=Exception)
    with Blueprint(resolve(str(request.getfixturevalue(which))), Shape("cpu", threads=2, max_out=3)) as blueprint:
        said = blueprint.memory(kv, n_ctx)
        with Model(blueprint, n_ctx, [kv]) as model:
            assert model.weights.n_bytes == said.weights
            assert model.tracks[0].pool.n_bytes == said.cache
            assert model.tracks[0].executor.work_bytes == said.workspace


def test_the_classic_figures(kvrun, shape_only):
    """Llama 3 8B: 8.03e9 parameters in 16 bits, 128 KiB of cache a token."""
    report = plan(kvrun, large(shape_only), "-n", "4096")
    assert abs(report["weights_bytes"] / (2 * 8.03e9) - 1) < 0.01
    assert report["bytes_per_token"] == 131072 and report["cache_bytes"] == 4096 * 131072
    assert report["groups"] == [{"layers": 32, "window": 0, "pages": 32, "cache_bytes": 4096 * 131072, "bytes_per_token": 131072}]
    assert report["total_bytes"] == sum(report[k] for k in ("weights_bytes", "cache_bytes", "workspace_bytes", "program_bytes"))
    assert report["trained_n_ctx"] == 131072


def test_config_alone_says_what_the_weights_say(kvrun, random_folder, shape_only):
    keys = ("weights_bytes", "cache_bytes", "workspace_bytes", "groups", "bytes_per_token", "n_ctx")
    whole, shape = plan(kvrun, random_folder), plan(kvrun, shape_only)
    assert [whole[k] for k in keys] == [shape[k] for k in keys]


def test_the_table_is_every_length_by_every_format(kvrun, shape_only):
    report = plan(kvrun, large(shape_only, max_position_embeddings=10000), "-n", "3000")
    lengths = [1024, 2048, 3000, 4096, 8192, 10000]
    assert [(row["n_ctx"], row["kv"]) for row in report["table"]] == [(n, kv) for n in lengths for kv in KV_CHOICES]
    assert set(report["largest_n_ctx"]) == set(KV_CHOICES)
    for row in report["table"]:
        assert row["fits"] == (row["total_bytes"] <= report["usable_bytes"]) == (row["n_ctx"] <= report["largest_n_ctx"][row["kv"]])
        assert row["total_bytes"] == report["weights_bytes"] + row["cache_bytes"] + row["workspace_bytes"] + report["program_bytes"]
    speeds = [row["tokens_per_second"] for row in report["table"] if row["kv"] == "f16"]
    if report["read_bytes_per_second"]:
        assert speeds == sorted(speeds, reverse=True) and speeds[0] < report["read_bytes_per_second"] / report["weights_bytes"] * 1.2


def test_what_does_not_fit_is_information_not_failure(kvrun, shape_only):
    report = plan(kvrun, large(shape_only, num_hidden_layers=1000), "-n", "max")
    assert report["fits"] is False and set(report["largest_n_ctx"].values()) == {0}
    result = kvrun("plan", shape_only)
    assert result.returncode == 0 and b"does not fit" in result.stdout and b"none" in result.stdout


def test_headroom(kvrun, random_folder):
    report = plan(kvrun, random_folder, "--headroom", "40")
    assert report["usable_bytes"] == pytest.approx(0.6 * report["available_bytes"], abs=2)
    assert plan(kvrun, random_folder)["headroom_percent"] == 10


def test_max_is_the_largest_that_fits(random_folder):
    with Blueprint(resolve(str(random_folder)), Shape("reference")) as blueprint:
        trained = blueprint.spec.n_positions
        assert blueprint.choose_n_ctx("max", "f16", 0) == trained
        wanted = blueprint.memory("f16", 20_000).total
        found = blueprint.choose_n_ctx("max", "f16", 1 - wanted / available_memory())
        assert found % 128 == 0 and 15_000 < found < 25_000  # other programs take and give memory meanwhile
        with pytest.raises(OutOfMemoryError):
            blueprint.choose_n_ctx("max", "f16", 1)


def test_run_takes_max(kvrun, scripted):
    said = json.loads(kvrun("run", scripted, "x", "-n", "max", "--json").stdout)
    assert said["n_ctx"] == plan(kvrun, scripted, "-n", "max")["n_ctx"] == 1 << 17


def test_for_people(kvrun, sliding):
    result = kvrun("plan", sliding)
    out = result.stdout.decode()
    assert result.returncode == 0 and result.stderr == b"" and "\x1b" not in out
    for word in ("weights", "workspace", "total", "fits", "a window of 40", "largest", *KV_CHOICES):
        assert word in out


def test_bad_input(kvrun, random_folder, tmp_path):
    check(kvrun("plan"), 2, "MODEL")
    check(kvrun("plan", random_folder, "-n", "0"), 2, "--n-ctx")
    check(kvrun("plan", random_folder, "-n", "many"), 2, "many", "max")
    check(kvrun("plan", random_folder, "-n", 1 << 18), 2, "131072")
    check(kvrun("plan", random_folder, "--kv", "q3"), 2, "q3", *KV_CHOICES)
    check(kvrun("plan", random_folder, "--headroom", "100"), 2, "--headroom")
    check(kvrun("plan", tmp_path), 5, "config.json")
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    check(kvrun("plan", tmp_path), 5, "MambaForCausalLM")

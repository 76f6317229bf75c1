"""The divergence of cache formats, against logits computed apart, and through the command."""

import json

import numpy as np
import pytest

from kvrun.blueprint import Blueprint, Shape
from kvrun.cache.formats import KV_CHOICES
from kvrun.hub import resolve
from kvrun.measure.divergence import SETTLE_STEPS, Comparison, decode_ms
from kvrun.measure.tracks import Model
from kvrun.runtime import open_engine

from ..backends.running import kl_divergence, logits_of
from .test_errors import check

KEYS = ["kv", "kld_mean", "kld_median", "kld_p99", "kld_max", "top1", "ppl_ratio", "bytes_per_token", "ms_per_token"]


@pytest.fixture
def text(rng, tmp_path):
    """1000 random letters: as many tokens of a byte-level vocabulary."""
    path = tmp_path / "text.txt"
    path.write_text("".join(rng.choice("abcdefghij \n") for _ in range(1000)))
    return path


@pytest.fixture
def front(random_folder):
    """How many tokens of BOS the tokenizer puts before a text."""
    from kvrun.text import load_text

    return len(load_text(resolve(str(random_folder))).encode("", bos=True))


def devices():
    try:
        import kvrun.backends.native  # noqa: F401
    except Exception:  # noqa: BLE001 - not built
        return ["reference"]
    return ["reference", "cpu"]


@pytest.mark.parametrize("device", devices())
def test_the_figures_are_those_of_the_logits(random_folder, rng, device):
    if device == "reference":
        import torch

        torch.set_num_threads(1)  # tiny matrices: more threads only wait for one another
    files = resolve(str(random_folder))
    kvs = ("f16", *(kv for kv in KV_CHOICES if kv != "f16"), "f16")
    windows = [[rng.randrange(256) for _ in range(140)] for _ in range(2)]
    with Blueprint(files, Shape(device, threads=2, max_out=16, prefill_chunk=64)) as blueprint:
        with Model(blueprint, 139 + SETTLE_STEPS + 1, kvs) as model:
            comparison = Comparison(model.tracks)
            for window in windows:
                comparison.add(window)
                assert {track.length for track in model.tracks} == {139}
            found = comparison.results()
            assert len(decode_ms(model.tracks, 1, rounds=1, steps=1)) == len(kvs)
            assert {track.length for track in model.tracks} == {139}
    logits = {}
    for kv in KV_CHOICES:
        engine = open_engine(files, device=device, n_ctx=140, kv=kv, threads=2, max_out=16, prefill_chunk=64)
        logits[kv] = np.concatenate([logits_of(engine, w, chunk=16)[70:139] for w in windows]).astype(np.float64)
        engine.close()
    following = np.concatenate([w[71:140] for w in windows])

    def nll(x):
        top = x.max(axis=1)
        return np.log(np.exp(x - top[:, None]).sum(axis=1)) + top - x[np.arange(len(x)), following]

    assert comparison.rows == 138 and comparison.perplexity == pytest.approx(np.exp(nll(logits["f16"]).mean()), rel=1e-4)
    for one in found[:-1]:
        kld = kl_divergence(logits["f16"], logits[one.kv])
        near = {"rel": 1e-3, "abs": 1e-6}
        assert one.kld_mean == pytest.approx(kld.mean(), **near) and one.kld_mean > 0
        assert one.kld_median == pytest.approx(np.median(kld), **near)
        assert one.kld_p99 == pytest.approx(np.quantile(kld, 0.99), **near)
        assert one.kld_max == pytest.approx(kld.max(), **near)
        assert one.top1 == (logits["f16"].argmax(axis=1) == logits[one.kv].argmax(axis=1)).mean()
        assert one.ppl_ratio == pytest.approx(np.exp((nll(logits[one.kv]) - nll(logits["f16"])).mean()), rel=1e-4)
    same = found[-1]
    assert (same.kv, same.kld_max, same.top1, same.ppl_ratio) == ("f16", 0, 1, 1)


def test_json(kvrun, random_folder, text, front):
    result = kvrun("compare", random_folder, "-f", text, "--kv", "f32,f16", "-n", "300", "--json")
    assert (result.returncode, result.stderr) == (0, b"")
    said = json.loads(result.stdout)
    assert [list(row) for row in said["rows"]] == [KEYS] * 2
    # windows of BOS, if any, and letters; rows 150 to 298 of each predict a token that is known
    assert (said["n_ctx"], said["windows"], said["compared"], said["unused_tokens"]) == (300, 3, 3 * 149, 1000 - 3 * (300 - front))
    f32, f16 = said["rows"]
    assert f32["bytes_per_token"] == 2 * f16["bytes_per_token"] == 2 * said["baseline"]["bytes_per_token"] == 3 * 2 * 2 * 32 * 4
    assert 0 < f32["kld_mean"] < 0.1 and f32["kld_median"] <= f32["kld_p99"] <= f32["kld_max"] and f32["ms_per_token"] > 0
    assert f16["kld_max"] == 0 and f16["top1"] == 1 and f16["ppl_ratio"] == 1


def test_for_people_and_from_standard_input(kvrun, random_folder, text):
    result = kvrun("compare", random_folder, "-f", "-", "-n", "128", input=text.read_bytes())
    out = result.stdout.decode()
    assert (result.returncode, result.stderr) == (0, b"") and "\x1b" not in out
    assert "7 windows of 128 tokens" in out
    assert all(f"\n{kv} " in out for kv in KV_CHOICES)  # the base and, without --kv, every other


def test_a_short_text_makes_one_window(kvrun, random_folder, front):
    said = json.loads(kvrun("compare", random_folder, "-f", "-", "--kv", "f32", "--json", input=b"x" * 70).stdout)
    assert (said["n_ctx"], said["windows"], said["unused_tokens"]) == (70 + front, 1, 0)


def test_bad_input(kvrun, random_folder, text, tmp_path, front):
    compare = ("compare", random_folder)
    check(kvrun(*compare), 2, "--file")
    check(kvrun(*compare, "-f", "-"), 2, "standard input is empty")
    check(kvrun(*compare, "-f", "-", input=b" \n"), 2, "standard input is empty")
    check(kvrun(*compare, "-f", "-", input=b"too short"), 2, "9 tokens", "too few")
    check(kvrun(*compare, "-f", text, "-n", "2000"), 2, "text.txt", "1000 tokens", f"-n {1000 + front}")
    check(kvrun(*compare, "-f", "-", input=b"caf\xe9"), 2, "0xe9", "UTF-8")
    check(kvrun(*compare, "-f", tmp_path / "absent"), 9, "absent")
    check(kvrun(*compare, "-f", tmp_path), 9, "directory")
    check(kvrun(*compare, "-f", text, "--kv", "q3"), 2, "q3", *KV_CHOICES)
    check(kvrun(*compare, "-f", text, "--kv", "f32,"), 2, "--kv f32,")
    check(kvrun(*compare, "-f", text, "-n", "3"), 2, "--n-ctx")
    check(kvrun(*compare, "-f", text, "-n", 1 << 18), 2, "131072")

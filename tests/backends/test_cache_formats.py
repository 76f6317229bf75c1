"""Quantized caches: the cpu executor against the reference for every pair of formats, and what they cost a real model."""

import random
from pathlib import Path

import numpy as np
import pytest

from kvrun.hub import resolve
from kvrun.runtime import open_engine

from ..engine.tiny_model import random_model
from .running import kl_divergence, logits_of

PROSE = (Path(__file__).parents[1] / "data" / "alice.txt").read_text(encoding="utf-8")
MIXES = ["q8/q4", "q4/q8", "f16/q8", "q8/f16", "f16/q4", "q4/f16"]
CASES = [(kv, dim, window) for kv in ("q8", "q4") for dim in (64, 96, 128, 256) for window in (0, 150)]
CASES += [(kv, (64, 96, 128, 256)[i % 4], 150 * (i % 2)) for i, kv in enumerate(MIXES)]


def spread(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square difference of logits, in standard deviations of the logits."""
    return float(np.sqrt(((a.astype(np.float64) - b) ** 2).mean()) / a.std())


@pytest.mark.parametrize("kv,dim,window", CASES, ids=str)
def test_cpu_follows_the_reference(tmp_path, kv, dim, window) -> None:
    """Prompt rows and decode rows over several pages, past the window. What the executor adds must be little beside what
    the format does to the model. Prompt rows are computed in 16 bits, so that K and V already differ a little before they
    are quantized, and some codes fall to the other side: a hundredth of 4-bit codes off by one is a third of their error."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    files = resolve(str(random_model(tmp_path / "tiny", seed, layers=1, window=window, dim=dim)))
    ids = np.random.default_rng(seed).integers(0, 256, 330).tolist()

    def run(device: str, fmt: str, chunk: int = 64, prefill: bool = True) -> np.ndarray:
        engine = open_engine(files, device=device, n_ctx=512, kv=fmt, threads=1, max_out=64, prefill_chunk=64)
        logits = logits_of(engine, ids, chunk=chunk, prefill=prefill)
        engine.close()
        return logits

    exact, half, want = (run("reference", fmt) for fmt in ("f32", "f16", kv))
    cost = spread(exact, want)
    assert 0 < cost < 0.3
    for chunk, prefill in ((64, True), (1, False)):
        got = run("cpu", kv, chunk, prefill)
        assert np.isfinite(got).all()
        own = spread(run("cpu", "f16", chunk, prefill), half)
        print(f"prefill {prefill}: format {cost:.4f}, arithmetic {own:.4f}, executor {spread(got, want):.4f}")
        assert spread(got, want) <= (0.6 if prefill else 0.2) * cost + 2 * own


@pytest.mark.parametrize("kv", ["q8", "q4", "q8/q4"])
def test_rows_do_not_depend_on_the_chunk(tmp_path, kv) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    files = resolve(str(random_model(tmp_path / "tiny", seed, dim=64)))
    engine = open_engine(files, device="cpu", n_ctx=512, kv=kv, threads=1, max_out=512, prefill_chunk=512)
    ids = np.random.default_rng(seed).integers(0, 256, 400).tolist()
    whole = logits_of(engine, ids, chunk=512)
    for chunk in (1, 17, 64, 128):
        assert np.array_equal(whole, logits_of(engine, ids, chunk=chunk))
    engine.close()


def test_kl_divergence_of_a_real_model(smollm2) -> None:
    """Mean KL divergence from the model's own 16-bit cache over English prose, prompt rows of 1,536 tokens."""
    def run(kv: str) -> np.ndarray:
        engine = open_engine(smollm2, device="cpu", n_ctx=1536, kv=kv, max_out=128, prefill_chunk=128)
        logits = logits_of(engine, engine.text.encode(PROSE)[:1536], chunk=128)
        engine.close()
        return logits

    want = run("f16")
    assert len(want) == 1536
    for kv, most in (("q8", 0.001), ("q4", 0.030), ("q8/q4", 0.030)):
        kl = kl_divergence(want, run(kv))
        assert kl.mean() <= most, f"{kv}: mean KL {kl.mean():.5f} nats, at most {most}"

"""Drawing against transformers' logits processors, and the draw itself against its own probabilities."""

import math
import random

import numpy as np
import pytest
import torch

from kvrun.backends.batch import Sampler
from kvrun.backends.sampling import draw, mix, probabilities, uniform


@pytest.fixture
def rng():
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def theirs(logits: np.ndarray, sampler: Sampler, recent: list[int]) -> np.ndarray:
    from transformers.generation import logits_process as lp

    steps = [lp.TemperatureLogitsWarper(sampler.temperature)]
    if sampler.repeat_penalty != 1:
        steps.insert(0, lp.RepetitionPenaltyLogitsProcessor(sampler.repeat_penalty))
    if sampler.top_k:
        steps.append(lp.TopKLogitsWarper(sampler.top_k))
    if sampler.top_p < 1:
        steps.append(lp.TopPLogitsWarper(sampler.top_p))
    if sampler.min_p:
        steps.append(lp.MinPLogitsWarper(sampler.min_p))
    scores = torch.from_numpy(logits)[None].double()
    for step in steps:
        scores = step(torch.tensor([recent]), scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("settings", [
    dict(), dict(top_k=7), dict(top_p=0.8), dict(min_p=0.1), dict(repeat_penalty=1.4), dict(repeat_penalty=0.7),
    dict(top_k=20, top_p=0.9, min_p=0.05, repeat_penalty=1.2), dict(top_k=1), dict(top_k=10**6), dict(top_p=1e-9)])
def test_probabilities_equal_transformers(rng, settings):
    for _ in range(20):
        logits = (rng.standard_normal(500) * 4).astype(np.float32)
        sampler = Sampler(temperature=float(rng.uniform(0.3, 2)), **settings)
        recent = rng.integers(0, 500, 60).tolist()
        got = probabilities(logits, sampler, recent)
        assert got == pytest.approx(theirs(logits, sampler, recent), abs=1e-6)
        assert got.sum() == pytest.approx(1)


def test_draws_follow_the_probabilities(rng):
    logits = rng.standard_normal(6).astype(np.float32)
    sampler = Sampler(seed=int(rng.integers(2**63)), temperature=1.3, top_k=5)
    p = probabilities(logits, sampler, [])
    counts = np.bincount([draw(logits, sampler, [], i) for i in range(20000)], minlength=6) / 20000
    assert np.abs(counts - p).max() < 0.02 and counts[p == 0].sum() == 0


def test_draws_depend_on_seed_and_position_alone():
    assert mix(0) == 0xE220A8397B1DCDAF                       # the first output of splitmix64 from state 0
    assert uniform(1, 2) != uniform(1, 3) != uniform(2, 3) and 0 <= uniform(2**64 - 1, 2**31) < 1
    logits = np.zeros(1000, np.float32)
    sampler = Sampler(seed=5, temperature=1)
    assert [draw(logits, sampler, [], i) for i in range(50)] == [draw(logits, sampler, [], i) for i in range(50)]
    assert draw(logits, sampler, [], 7) == math.floor(uniform(5, 7) * 1000)


def test_greedy_takes_the_lowest_id_among_equals():
    logits = np.array([1, 5, 5, 2], np.float32)
    assert draw(logits, Sampler(), [], 0) == 1
    assert draw(logits, Sampler(repeat_penalty=2.0), [1, 1, 9], 0) == 2
    assert draw(-logits, Sampler(repeat_penalty=6.0), [0, 3], 0) == 1
    assert draw(logits, Sampler(temperature=1e-300), [], 0) in (1, 2)

"""One draw of a token, as kv_sampler in kernels/kvrun.h says. numpy, so that tests of every executor can use it."""

from __future__ import annotations

import numpy as np

from kvrun.backends.batch import Sampler

MASK = 2**64 - 1


def mix(x: int) -> int:
    """splitmix64 (Steele, Lea and Flood, 2014) of one state."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1), a multiple of 2^-24, that decides the draw at `position`."""
    return (mix((seed & MASK) ^ mix(position)) >> 40) * 2.0**-24


def probabilities(logits: np.ndarray, sampler: Sampler, recent: list[int]) -> np.ndarray:
    """float64 [vocab]: chances of each token after every filter, summing to 1; temperature must be above 0."""
    x = penalized(logits, sampler, recent)
    x = (x - x.max()) / sampler.temperature
    if 0 < sampler.top_k < len(x):
        x[x < np.partition(x, -sampler.top_k)[-sampler.top_k]] = -np.inf
    p = np.exp(x)
    p /= p.sum()
    if sampler.top_p < 1:
        order = np.argsort(-p, kind="stable")                 # ties: lower id first
        kept = np.searchsorted(np.cumsum(p[order]), sampler.top_p) + 1
        p[order[kept:]] = 0
    if sampler.min_p > 0:
        p[p < sampler.min_p * p.max()] = 0
    return p / p.sum()


def penalized(logits: np.ndarray, sampler: Sampler, recent: list[int]) -> np.ndarray:
    """float64 copy of the logits with the repeat penalty (in float32) on every id of `recent`, once."""
    x = np.array(logits, dtype=np.float32)
    if sampler.repeat_penalty != 1:
        ids = np.array([i for i in set(recent) if 0 <= i < len(x)], dtype=np.int64)
        penalty = np.float32(sampler.repeat_penalty)
        x[ids] = np.where(x[ids] < 0, x[ids] * penalty, x[ids] / penalty)
    return x.astype(np.float64)


def draw(logits: np.ndarray, sampler: Sampler, recent: list[int], position: int) -> int:
    """The token drawn from float32 logits [vocab] at `position`; the lowest id among equals when greedy."""
    if sampler.temperature <= 0:
        return int(np.argmax(penalized(logits, sampler, recent)))
    cumulative = np.cumsum(probabilities(logits, sampler, recent))
    return int(np.searchsorted(cumulative, uniform(sampler.seed, position) * cumulative[-1], side="right"))

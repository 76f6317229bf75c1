"""What a cache format costs: the divergence of its next-token distributions from those of another cache.

Windows of text go through both caches as prompt rows, which attend what the cache holds, so a prompt row sees exactly
what a decoded one would. The first half of a window fills the caches; each row of the second half is compared, row by
row in place, so memory does not grow with the text. The measure is llama.cpp's perplexity --kl-divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Items
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from kvrun.errors import NumericError
from kvrun.measure.tracks import Track

LOGITS_BYTES = 16 << 20
"""Most bytes of logits of one step, in each cache."""


def rows_per_step(vocab_size: int) -> int:
    """Rows whose logits a step gives: as many as LOGITS_BYTES hold."""
    return max(4, min(128, LOGITS_BYTES // (4 * vocab_size)))


@dataclass(frozen=True)
class Divergence:
    """One format against the base. kld_*: Kullback-Leibler divergence in nats, base first. top1: share of rows where
    both think the same token likeliest. ppl_ratio: perplexity over the base's."""

    kv: str
    kld_mean: float
    kld_median: float
    kld_p99: float
    kld_max: float
    top1: float
    ppl_ratio: float


class _Row:
    """A row of logits, ready to be compared: x float32 [vocab], its exponentials relative to the maximum, log of their sum."""

    def __init__(self, logits: np.ndarray) -> None:
        self.best = int(logits.argmax())
        top = logits[self.best]
        if not np.isfinite(top):
            raise NumericError("the model gave NaN or Inf logits; its weights may be damaged: try 'kvrun verify'")
        self.x = logits - top
        self.exp = np.exp(self.x)
        self.sum = float(self.exp.sum(dtype=np.float64))
        self.log_sum = float(np.log(self.sum))

    def nll(self, token: int) -> float:
        """Negative log-likelihood of `token`, nats."""
        return self.log_sum - float(self.x[token])

    def divergence(self, other: _Row) -> float:
        """KL(self || other), nats. Rounding can take it a hair below 0, which it cannot be."""
        mean = float((self.exp * (self.x - other.x)).sum(dtype=np.float64)) / self.sum
        return max(0.0, mean - self.log_sum + other.log_sum)


class Comparison:
    """Collects rows over windows: tracks[0] is the base, every other is compared with it."""

    def __init__(self, tracks: Items[Track]) -> None:
        self.tracks = list(tracks)
        self.rows = 0
        self._nll = [0.0] * len(self.tracks)
        self._kld: list[list[float]] = [[] for _ in self.tracks]
        self._same = [0] * len(self.tracks)

    def add(self, window: Items[int], progress: Callable[[int], None] = lambda rows: None) -> None:
        """Scores the second half of `window` (token ids); leaves its tokens but the last in every cache."""
        half = len(window) // 2
        for track in self.tracks:
            track.rewind(0)
            track.prefill(window[:half])
        step = min(track.executor.plan.max_out for track in self.tracks)
        start = half
        while start < len(window) - 1:
            rows = min(track.most_rows(step) for track in self.tracks)
            part = window[start : min(start + rows, len(window) - 1)]
            for track in self.tracks:
                track.prefill(part, out=True)
            logits = [track.logits() for track in self.tracks]
            for row in range(len(part)):
                self._compare([each[row] for each in logits], window[start + row + 1])
            start += len(part)
            progress(start)

    def _compare(self, logits: list[np.ndarray], following: int) -> None:
        base = _Row(logits[0])
        self.rows += 1
        self._nll[0] += base.nll(following)
        for i in range(1, len(logits)):
            other = _Row(logits[i])
            self._nll[i] += other.nll(following)
            self._kld[i].append(base.divergence(other))
            self._same[i] += other.best == base.best

    @property
    def perplexity(self) -> float:
        """The base's."""
        return float(np.exp(self._nll[0] / self.rows))

    def results(self) -> list[Divergence]:
        """One of each track but the base."""
        out = []
        for i, track in enumerate(self.tracks[1:], 1):
            kld = np.array(self._kld[i])
            out.append(Divergence(track.kv, float(kld.mean()), float(np.median(kld)), float(np.quantile(kld, 0.99)), float(kld.max()),
                                  self._same[i] / self.rows, float(np.exp((self._nll[i] - self._nll[0]) / self.rows))))
        return out


SETTLE_STEPS, SETTLE_SECONDS = 40, 0.2
"""Decode steps before those that count, at most: after a change of caches, what a last-level cache keeps takes this long to settle."""


def decode_ms(tracks: Items[Track], token: int, *, rounds: int, steps: int = 4) -> list[float]:
    """Milliseconds of one decode step behind what each cache holds now, in steady decoding: the median of `rounds`, the
    tracks taking turns, each the mean of `steps` after one and up to SETTLE_STEPS others, which are taken back. The
    caches are left as they were, and must have room for SETTLE_STEPS and for one token more than `steps`."""
    seconds: list[list[float]] = [[] for _ in tracks]
    for _ in range(rounds):
        for track, taken in zip(tracks, seconds, strict=True):
            length = track.length
            end = perf_counter() + SETTLE_SECONDS
            for _ in range(SETTLE_STEPS):
                track.decode(token)
                if perf_counter() > end:
                    break
            track.rewind(length)
            following = track.decode(token)
            started = perf_counter()
            for _ in range(steps):
                following = track.decode(following)
            taken.append((perf_counter() - started) / steps)
            track.rewind(length)
    return [1000 * float(np.median(taken)) for taken in seconds]

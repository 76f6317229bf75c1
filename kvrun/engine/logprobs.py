"""Log-probabilities out of logits."""

from __future__ import annotations

import numpy as np

from kvrun.engine.events import TokenLogprob
from kvrun.errors import NumericError


def token_logprob(logits: object, index: int, token: int, k: int) -> TokenLogprob:
    """The log-probability of `token` and the k most likely ones under softmax(logits).

    logits: float32 [vocab], buffer protocol. index: the token's place, carried into the result. The softmax is taken
    in float64 over the model's own logits, before penalties and temperature. Ties: lower id first. Raises
    NumericError for NaN or no finite maximum.
    """
    row = np.asarray(logits, dtype=np.float64)
    highest = row.max()
    if not np.isfinite(highest):
        raise NumericError(f"the model gave NaN or Inf logits before token {index}; its weights may be damaged: "
                           "try 'kvrun verify'")
    row = row - (highest + np.log(np.exp(row - highest).sum()))
    return TokenLogprob(index, token, float(row[token]), _top(row, min(k, len(row))))


def _top(row: np.ndarray, k: int) -> tuple[tuple[int, float], ...]:
    if k == 0:
        return ()
    threshold = np.partition(row, len(row) - k)[len(row) - k]
    candidates = np.flatnonzero(row >= threshold)  # more than k when the last place is shared
    order = candidates[np.argsort(-row[candidates], kind="stable")][:k]
    return tuple((int(i), float(row[i])) for i in order)

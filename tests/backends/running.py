"""Runs token ids through an opened engine's executor, row by row or chunk by chunk, and collects the logits."""

from __future__ import annotations

import numpy as np

from kvrun.backends.batch import Batch


def logits_of(engine, ids: list[int], *, chunk: int, prefill: bool = True) -> np.ndarray:
    """float32 [len(ids)][vocab] from an emptied cache, in steps of `chunk` rows, every row giving logits."""
    engine.sequence.clear()
    rows = []
    while (start := engine.sequence.length) < len(ids):
        part = ids[start : start + engine.sequence.most_rows(chunk)]
        engine.sequence.extend(len(part))
        engine.executor.step(Batch(
            tokens=part, positions=list(range(start, start + len(part))), prefill=prefill,
            tables=[[t] for t in engine.sequence.tables()], out_rows=list(range(len(part)))))
        rows.append(np.array(engine.executor.logits(), copy=True))
    return np.concatenate(rows)


def kl_divergence(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """KL(p || q) of each row, in nats."""
    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        x = x - x.max()
        return x - np.log(np.exp(x).sum())

    rows = []
    for p_row, q_row in zip(p_logits, q_logits, strict=True):  # row by row: whole vocabularies in float64 are large
        p, q = log_softmax(p_row), log_softmax(q_row)
        rows.append((np.exp(p) * (p - q)).sum())
    return np.array(rows)

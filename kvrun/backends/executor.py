"""The one shape of every executor."""

from __future__ import annotations

from typing import Protocol

from kvrun.backends.batch import Batch
from kvrun.backends.plan import Plan


class Executor(Protocol):
    """Runs a plan over batches. Built with everything allocated; a step allocates nothing that lasts."""

    name: str
    plan: Plan
    kv: tuple[str, str]
    """Formats of K and V in the cache."""
    appended: int
    """(row, layer) pairs whose K and V were computed since the start."""

    def step(self, batch: Batch) -> list[int]:
        """Runs one batch: stores its K and V, computes the wanted logits, returns the drawn tokens ([] without a
        sampler). Raises NumericError when logits to draw from are not finite."""

    def logits(self) -> object:
        """float32 [len(out_rows)][vocab] array (buffer protocol) of the last step; overwritten by the next."""

    def close(self) -> None:
        """Gives threads and memory back. Idempotent."""

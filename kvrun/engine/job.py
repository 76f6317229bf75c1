"""One generation: what is wanted of it, and what it has counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvrun.backends.batch import Sampler
from kvrun.engine.events import Stats, TokenLogprob

if TYPE_CHECKING:
    from kvrun.text.grammar import Constraint


class Job:
    """One generation's wishes, and what it has counted."""

    def __init__(self, ids: list[int], sampler: Sampler, max_tokens: int | None, stop: list[str], logprobs: int,
                 echo: bool, continued: bool, constraint: Constraint | None = None) -> None:
        self.constraint = constraint
        self.ids = ids
        self.sampler = sampler
        self.max_tokens = max_tokens
        self.stop = stop
        self.logprobs = logprobs
        self.echo = echo
        self.continued = continued
        self.stats = Stats(prompt_tokens=len(ids))
        self.prompt_logprobs: list[TokenLogprob] = []
        # The penalty counts an id once, so a set in order of appearance does; it stays empty where nothing reads it.
        self.seen: dict[int, None] = dict.fromkeys(ids) if sampler.repeat_penalty != 1.0 else {}

    def note(self, token: int) -> None:
        """A token was drawn."""
        if self.sampler.repeat_penalty != 1.0:
            self.seen[token] = None

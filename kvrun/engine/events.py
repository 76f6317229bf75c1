"""What the engine tells: typed events, with no terminal in sight."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability and the most likely tokens at its place, best first: (id, logprob)."""

    index: int
    id: int
    logprob: float | None         # None for the first prompt token: nothing predicts it
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Prefill:
    """Prompt progress: `done` of `total` tokens are in the cache, `cached` of them were there before."""

    done: int
    total: int
    cached: int


@dataclass(frozen=True)
class Token:
    """One generated token and the text that became complete with it (may be empty)."""

    id: int
    text: str
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class Notice:
    """Something the user must be told (a re-prefill)."""

    text: str


@dataclass(frozen=True)
class Eviction:
    """K and V that were dropped. positions: half-open ranges, as they were counted then. tokens: how many that is.

    reason: "n_ctx" (the context was full) or "n_positions" (the trained length was reached, and what is held was read
    again, as a shorter text).
    """

    positions: tuple[tuple[int, int], ...]
    tokens: int
    reason: str


@dataclass
class Stats:
    """Counts and seconds of one generation.

    cached_tokens: prompt tokens whose K and V were in the cache before. prefilled_tokens: those that were computed, in
    prefill_seconds, which end when the first token is drawn. decode_steps: forward passes after it, in decode_seconds.
    reread_tokens: those computed again because the trained length was reached. evictions: what was dropped.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    decode_steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    reread_tokens: int = 0
    evictions: list[Eviction] = field(default_factory=list)

    @property
    def evicted_tokens(self) -> int:
        """Tokens whose K and V were dropped."""
        return sum(eviction.tokens for eviction in self.evictions)

    @property
    def prefill_rate(self) -> float:
        """Computed prompt tokens a second."""
        return self.prefilled_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Decode steps a second."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Stop:
    """The end. reason: "eos", "stop" (a stop string), "length" (max_tokens), "context" (n_ctx full), "interrupt".

    text: what was still held back for a stop string. prompt_logprobs: filled when asked for.
    """

    reason: str
    text: str = ""
    stats: Stats = field(default_factory=Stats)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


Event = Prefill | Token | Notice | Eviction | Stop

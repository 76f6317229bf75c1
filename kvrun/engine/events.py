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
    """Something the user must be told (a re-prefill, a dropped page)."""

    text: str


@dataclass
class Stats:
    """Counts and seconds of one generation."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class Stop:
    """The end. reason: "eos", "stop" (a stop string), "length" (max_tokens), "context" (n_ctx full), "interrupt".

    text: what was still held back for a stop string. prompt_logprobs: filled when asked for.
    """

    reason: str
    text: str = ""
    stats: Stats = field(default_factory=Stats)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


Event = Prefill | Token | Notice | Stop

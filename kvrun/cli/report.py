"""What an answer cost and said, as one line for people and as JSON for programs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvrun.cache.formats import kv_name
from kvrun.engine.events import Eviction, Prefill
from kvrun.terminal.sanitize import json_safe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvrun.backends.batch import Sampler
    from kvrun.engine import Engine
    from kvrun.engine.events import Event, Stop, Token, TokenLogprob
    from kvrun.hub.files import ModelFiles


def stats_line(engine: Engine, sampler: Sampler, end: Stop) -> str:
    """Counts, speeds and settings of one answer."""
    stats = end.stats
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    evicted = f" · dropped {stats.evicted_tokens} tok" if stats.evicted_tokens else ""
    reread = f" · read again {stats.reread_tokens} tok" if stats.reread_tokens else ""
    seed = f" · seed {sampler.seed}" if sampler.temperature > 0 else " · greedy"
    return (f"prompt {stats.prompt_tokens} tok{cached} in {stats.prefill_seconds:.2f} s, {stats.prefill_rate:.0f} tok/s"
            f" · answer {stats.generated_tokens} tok in {stats.decode_seconds:.2f} s, {stats.decode_rate:.1f} tok/s"
            f" · ctx {engine.held}/{engine.n_ctx}{evicted}{reread} · kv {kv_name(engine.executor.kv)} · {engine.executor.name}{seed} · {end.reason}")


class Drops:
    """Says what is dropped from a full context: in one line for as long as a prompt is read, at once while an answer comes."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify = notify
        self._waiting: list[Eviction] = []

    def event(self, event: Event) -> None:
        """Takes every event of a generation."""
        if self._waiting and not (isinstance(event, Prefill) or isinstance(event, Eviction) and event.reason == self._waiting[0].reason):
            self._notify(_eviction_line(self._waiting))
            self._waiting = []
        if isinstance(event, Eviction):
            self._waiting.append(event)


def _eviction_line(events: Sequence[Eviction]) -> str:
    """What was dropped for the same reason, and why."""
    spans: list[list[int]] = []
    for first, end in sorted(span for event in events for span in event.positions):
        if spans and first == spans[-1][1]:
            spans[-1][1] = end
        else:
            spans.append([first, end])
    where = ", ".join(f"{first}-{end - 1}" for first, end in spans[:4]) + (", ..." if len(spans) > 4 else "")
    why = {"n_ctx": "context full", "n_positions": "trained length reached"}[events[0].reason]
    return f"{why}: dropped {sum(event.tokens for event in events)} tokens, positions {where}"


def answer_json(files: ModelFiles, engine: Engine, sampler: Sampler, tokens: Sequence[Token], end: Stop, parts: dict[str, Any]) -> str:
    """One JSON object and a newline. parts: text, answer and reasoning. Without log-probabilities a token's `logprob` is null and its
    `top` empty; `prompt_logprobs` is null unless --echo asked for it. Positions of an eviction are half-open ranges."""
    def place(index: int, token: int, record: TokenLogprob | None) -> dict[str, Any]:
        return {
            "index": index, "id": token, "token": engine.text.token_text(token),
            "logprob": _number(record.logprob) if record else None,
            "top": [{"id": i, "token": engine.text.token_text(i), "logprob": _number(p)} for i, p in record.top] if record else [],
        }

    return as_json({
        **parts, "tokens": [place(index, token.id, token.logprob) for index, token in enumerate(tokens)],
        "prompt_logprobs": [place(p.index, p.id, p) for p in end.prompt_logprobs] or None,
        **summary(files, engine, sampler, end)})


def summary(files: ModelFiles, engine: Engine, sampler: Sampler, end: Stop) -> dict[str, Any]:
    """Counts, times and settings of one answer."""
    stats = end.stats
    return {
        "model": files.name, "revision": files.revision, "finish_reason": end.reason,
        "usage": {"prompt_tokens": stats.prompt_tokens, "cached_tokens": stats.cached_tokens,
                  "completion_tokens": stats.generated_tokens, "total_tokens": stats.prompt_tokens + stats.generated_tokens},
        "timing": {"prefill_seconds": stats.prefill_seconds, "prefill_tokens_per_second": stats.prefill_rate,
                   "decode_seconds": stats.decode_seconds, "decode_tokens_per_second": stats.decode_rate},
        "evicted_tokens": stats.evicted_tokens, "reread_tokens": stats.reread_tokens,
        "evictions": [{"reason": e.reason, "tokens": e.tokens, "positions": e.positions} for e in stats.evictions],
        "n_ctx": engine.n_ctx, "kv": kv_name(engine.executor.kv), "device": engine.executor.name,
        "seed": sampler.seed, "sampling": {k: v for k, v in asdict(sampler).items() if k != "seed"},
    }


def as_json(document: object) -> str:
    """A JSON document and a newline, safe to print on a terminal."""
    return json_safe(json.dumps(document, ensure_ascii=False, allow_nan=False)) + "\n"


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

"""Reads a generation to its end."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvrun.engine.events import Eviction, Notice, Prefill, Stop, Token


@dataclass
class Answer:
    """All events of a generation, by kind."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    evictions: list[Eviction] = field(default_factory=list)
    stop: Stop | None = None

    @property
    def reason(self) -> str:
        return self.stop.reason


def collect(events) -> Answer:
    """The answer; the cache agrees with the tokens after every event, which the caller's engine is checked for."""
    answer = Answer()
    for event in events:
        assert answer.stop is None, "Stop is the last event"
        if isinstance(event, Token):
            answer.ids.append(event.id)
            answer.tokens.append(event)
            answer.text += event.text
        elif isinstance(event, Prefill):
            answer.prefills.append(event)
        elif isinstance(event, Notice):
            answer.notices.append(event)
        elif isinstance(event, Eviction):
            answer.evictions.append(event)
        elif isinstance(event, Stop):
            answer.stop = event
            answer.text += event.text
    return answer


def random_ids(rng, n: int) -> list[int]:
    """n ids of plain bytes."""
    return [rng.randrange(256) for _ in range(n)]

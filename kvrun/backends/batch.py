"""What one step works on: rows of tokens, the page tables they see, and how to draw the next tokens."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sampler:
    """Settings of one draw, as kv_sampler in kernels/kvrun.h. temperature 0 is greedy."""

    seed: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0


@dataclass(frozen=True)
class PageTable:
    """Pages of one sequence in one layer group, oldest first; base[i] is the position of slot 0 of pages[i]."""

    pages: tuple[int, ...] | list[int]
    base: tuple[int, ...] | list[int]


@dataclass
class Batch:
    """One step. tokens, positions and sequences have one entry a row; tables[group][sequence].

    prefill: prompt rows (True) or decode rows (False); it chooses the arithmetic, not the row count.
    out_rows: rows whose logits are wanted. sampler: None to draw nothing. recent: token ids for the repeat penalty.
    """

    tokens: list[int]
    positions: list[int]
    tables: list[list[PageTable]]
    prefill: bool = False
    sequences: list[int] | None = None
    out_rows: list[int] = field(default_factory=list)
    sampler: Sampler | None = None
    recent: list[int] = field(default_factory=list)

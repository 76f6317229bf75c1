"""The state block of a step: kv_state and all that it points to, in one stretch of memory, so that one copy moves it."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np

from kvrun.backends.batch import Batch, PageTable
from kvrun.backends.memory import aligned
from kvrun.backends.native import ffi, lib
from kvrun.backends.plan import Plan


class StateBlock:
    """Writes batches of one sequence into `host` with pointers that hold in device memory at `address`.

    What a step gives back comes first: kv_state, then next[max_out]: the first `result_bytes`. Then what it reads: `used`
    bytes in all.
    """

    def __init__(self, plan: Plan, max_pages: int, host: np.ndarray, address: int) -> None:
        """host: uint8 [n_bytes(plan, max_pages)]. address: of the block on the device."""
        self._max_pages, self._host, self.address = max_pages, host, address
        at, self.n_bytes = _offsets(plan, max_pages)
        self.result_bytes = at["next"] + 4 * plan.max_out
        self._recent_at = at["recent"]
        host[:] = 0
        base = host.ctypes.data

        def here(name: str, kind: str) -> Any:
            return ffi.cast(kind, base + at[name])

        def there(name: str, kind: str = "int32_t *", plus: int = 0) -> Any:
            return ffi.cast(kind, address + at[name] + plus)

        self.state = state = here("state", "kv_state *")
        self._arrays = {name: here(name, "int32_t *") for name in ("next", "token", "pos", "seq", "out_row")}
        for name in self._arrays:
            setattr(state, name, there(name))
        self._tables = here("table", "kv_table *")
        self._lists = [here(name, "int32_t *") for name in ("pages", "bases")]
        for g in range(len(plan.groups)):
            self._tables[g].page = there("pages", plus=4 * max_pages * g)
            self._tables[g].base = there("bases", plus=4 * max_pages * g)
        state.table, state.n_groups, state.n_seqs = there("table", "kv_table *"), len(plan.groups), 1
        self._samplers, self._sampler_there = here("sampler", "kv_sampler *"), there("sampler", "kv_sampler *")
        self._recent, self._recent_there = here("recent", "int32_t *"), there("recent")
        self.used = self._recent_at

    @property
    def state_address(self) -> int:
        """Of the block on the host."""
        return self._host.ctypes.data

    @staticmethod
    def n_bytes_of(plan: Plan, max_pages: int) -> int:
        """Bytes of the block."""
        return _offsets(plan, max_pages)[1]

    def write(self, batch: Batch, appended: int) -> None:
        """Writes what a step reads. appended: what its counter goes on from. ValueError for a page table or a list of
        penalized tokens that is longer than there is room for."""
        rows, out = len(batch.tokens), len(batch.out_rows)
        state, arrays = self.state, self._arrays
        arrays["token"][0:rows] = batch.tokens
        arrays["pos"][0:rows] = batch.positions
        arrays["seq"][0:rows] = batch.sequences or [0] * rows
        arrays["out_row"][0:out] = batch.out_rows
        state.n_rows, state.n_out, state.prefill, state.status, state.appended = rows, out, batch.prefill, lib.KV_OK, appended
        for g, (table,) in enumerate(batch.tables):
            self._write_table(g, table)
        self._write_sampler(batch, out)

    def _write_table(self, g: int, table: PageTable) -> None:
        n = len(table.pages)
        if n > self._max_pages:
            raise ValueError(f"a page table of {n} pages; there is room for {self._max_pages}")
        for values, to in zip((table.pages, table.base), self._lists, strict=True):
            ffi.memmove(to + self._max_pages * g, values if isinstance(values, array) else array("i", values), 4 * n)
        self._tables[g].n_pages = n

    def _write_sampler(self, batch: Batch, out: int) -> None:
        sampler = batch.sampler
        self.used = self._recent_at
        if sampler is None:
            self.state.sampler = ffi.NULL
            return
        # An id counts once, and one outside the vocabulary not at all; so there is room for all of them.
        recent = list(dict.fromkeys(batch.recent)) if sampler.repeat_penalty != 1.0 else []
        if 4 * len(recent) > self.n_bytes - self._recent_at:
            raise ValueError(f"{len(recent)} different tokens to penalize in a vocabulary of fewer")
        self._recent[0 : len(recent)] = recent
        self.used += 4 * len(recent)
        for entry in self._samplers[0:out]:
            entry.seed = sampler.seed % 2**64
            entry.temperature, entry.top_p, entry.min_p = sampler.temperature, sampler.top_p, sampler.min_p
            entry.repeat_penalty, entry.top_k = sampler.repeat_penalty, sampler.top_k
            entry.recent, entry.n_recent = self._recent_there if recent else ffi.NULL, len(recent)
        self.state.sampler = self._sampler_there


def _offsets(plan: Plan, max_pages: int) -> tuple[dict[str, int], int]:
    """Where the parts begin, and where the last one ends."""
    rows, out, groups = 4 * plan.max_rows, 4 * plan.max_out, len(plan.groups)
    sizes = {"state": ffi.sizeof("kv_state"), "next": out, "token": rows, "pos": rows, "seq": rows, "out_row": out,
             "sampler": plan.max_out * ffi.sizeof("kv_sampler"), "table": groups * ffi.sizeof("kv_table"),
             "pages": 4 * max_pages * groups, "bases": 4 * max_pages * groups, "recent": 4 * plan.vocab_size}
    at, end = {}, 0
    for name, size in sizes.items():
        at[name] = end
        end += aligned(size)
    return at, end

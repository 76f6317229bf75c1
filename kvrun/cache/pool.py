"""The memory of the page pool: one allocation per layer group, made at start and never again.

A page holds 128 token slots of every layer of its group: [layer][K of each KV head, V of each KV head]. So a page is
one contiguous range of bytes, whatever is later done with it (written to disk, hashed, copied). After the pages comes
the side memory that a 4-bit cache keeps for the sequence, [layer].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from kvrun.backends.memory import Arena
from kvrun.backends.plan import CacheGroup
from kvrun.cache.formats import GroupLayout
from kvrun.cache.pages import FreeList, Sequence
from kvrun.cache.planner import pool_layouts

if TYPE_CHECKING:
    from kvrun.backends.cuda_device import Memory


Allocate = Callable[[int, str], "Memory"]
"""(bytes, purpose) -> memory with `address` and `close()`: Arena, or a device's."""


class GroupMemory:
    """One group's pages and side memory, at address and side_address. In the host's memory also as arrays; memory: uint8
    [n_pages * page_stride]. side: uint8 [layers * side_stride]. None in a device's."""

    def __init__(self, layout: GroupLayout, allocate: Allocate = Arena) -> None:
        self.layout = layout
        self._arena = allocate(layout.n_bytes, "the KV cache")
        self.address: int = self._arena.address
        self.side_address = self.address + layout.page_bytes
        on_host = isinstance(self._arena, Arena)
        self.memory: np.ndarray | None = self._arena.bytes[: layout.page_bytes] if on_host else None
        self.side: np.ndarray | None = self._arena.bytes[layout.page_bytes : layout.n_bytes] if on_host else None

    k_dtype = property(lambda self: self.layout.k_dtype)
    v_dtype = property(lambda self: self.layout.v_dtype)
    page_stride = property(lambda self: self.layout.page_stride)
    layer_stride = property(lambda self: self.layout.layer_stride)
    v_offset = property(lambda self: self.layout.v_offset)
    side_stride = property(lambda self: self.layout.side_stride)

    def read(self, offset: int, n_bytes: int) -> np.ndarray:
        """uint8 [n_bytes] from byte `offset`: a view, of a device's memory a copy."""
        return self._arena.bytes[offset : offset + n_bytes] if self.memory is not None else self._arena.read(offset, n_bytes)

    def write(self, offset: int, data: np.ndarray) -> None:
        """Puts what read() gave back to where it was from."""
        if self.memory is None:
            self._arena.write(offset, data)

    def close(self) -> None:
        """Gives the memory back."""
        self.memory = self.side = None
        self._arena.close()


class Pool:
    """Pages for one sequence of n_ctx tokens. groups[i] is the memory of plan group i."""

    def __init__(self, groups: tuple[CacheGroup, ...], *, n_ctx: int, chunk: int, kv: tuple[str, str], allocate: Allocate = Arena) -> None:
        """allocate: where the memory comes from."""
        self.n_ctx = n_ctx
        self.plan_groups = groups
        layouts = pool_layouts(groups, n_ctx=n_ctx, chunk=chunk, kv=kv)
        self.kv = kv
        self.whole_pages = "q4" in kv
        self.groups = [GroupMemory(layout, allocate) for layout in layouts]
        self._free = [FreeList(layout.n_pages) for layout in layouts]

    @property
    def n_bytes(self) -> int:
        """Bytes of all pages and side memory: what the planner announced."""
        return sum(g.layout.n_bytes for g in self.groups)

    @property
    def max_pages(self) -> int:
        """The longest page table that a sequence can have."""
        return max(g.layout.n_pages for g in self.groups)

    def sequence(self) -> Sequence:
        """A new, empty sequence that takes its pages from this pool. One at a time where there is side memory."""
        return Sequence(self.plan_groups, self._free, self.n_ctx, whole_pages=self.whole_pages)

    def page(self, group: int, page: int) -> np.ndarray:
        """The bytes of one page as they lie: uint8 [page_stride], a view; of a device's memory a copy."""
        stride = self.groups[group].page_stride
        return self.groups[group].read(page * stride, stride)

    def put_page(self, group: int, page: int, data: np.ndarray) -> None:
        """Makes `data`, which page() gave and the caller has filled, the bytes of the page."""
        self.groups[group].write(page * self.groups[group].page_stride, data)

    def sides(self) -> list[np.ndarray]:
        """The side memory of each group that has one, as page() gives pages."""
        return [g.read(g.layout.page_bytes, g.layout.side_bytes) for g in self.groups if g.side_stride]

    def put_sides(self, data: list[np.ndarray]) -> None:
        """As put_page, of what sides() gave."""
        for group, part in zip((g for g in self.groups if g.side_stride), data, strict=True):
            group.write(group.layout.page_bytes, part)

    def close(self) -> None:
        """Gives the memory back."""
        for group in self.groups:
            group.close()

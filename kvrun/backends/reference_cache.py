"""One layer's K and V for the reference executor: torch and numpy views of the pool's own memory, laid out as
kernels/page.h says. Read it beside that header."""

from __future__ import annotations

import math

import numpy as np
import torch

from kvrun.backends.batch import PageTable
from kvrun.backends.reference_pages import decode_page, encode_k_q4, encode_v_q4, store_q8
from kvrun.cache.formats import LANES, PAGE, SINKS, page_head_bytes

PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Tiles:
    """K or V as plain numbers. values: K [pages][kv_heads][slots/16][head_dim/2][16][2], V [pages][kv_heads][slots/2][head_dim][2]."""

    def __init__(self, memory: np.ndarray, offset: int, stride: int, shape: tuple[int, int, int], dtype: str, is_v: bool):
        """memory: uint8. offset of page 0, stride between pages: bytes. shape: (kv_heads, slots, head_dim)."""
        heads, slots, dim = shape
        shape = (heads, slots // 2, dim, 2) if is_v else (heads, slots // LANES, dim // 2, LANES, 2)
        values = torch.from_numpy(memory).view(PLAIN[dtype])
        size = values.element_size()
        pages = (memory.nbytes - offset - math.prod(shape) * size) // stride + 1
        strides = [math.prod(shape[i + 1:]) for i in range(len(shape))]
        self.values = values.as_strided((pages, *shape), (stride // size, *strides), offset // size)
        self.is_v = is_v

    def store(self, page: torch.Tensor, slot: torch.Tensor, x: torch.Tensor) -> None:
        """page, slot: [R]. x: [R][kv_heads][head_dim]."""
        if self.is_v:
            self.values[page, :, slot // 2, :, slot % 2] = x.to(self.values.dtype)
        else:
            self.values[page, :, slot // LANES, :, slot % LANES] = x.unflatten(-1, (-1, 2)).to(self.values.dtype)

    def load(self, pages: list[int]) -> torch.Tensor:
        """Every slot of `pages`, float32 [pages][kv_heads][slots][head_dim]."""
        turned = self.values[pages].transpose(-1, -2) if self.is_v else self.values[pages].transpose(3, 4)
        floats = torch.empty(turned.shape).copy_(turned)
        return floats.flatten(2, 3) if self.is_v else floats.flatten(4).flatten(2, 3)


class Quantized:
    """K or V in q8 or q4. bytes: uint8 [pages][kv_heads][page_head_bytes]."""

    def __init__(self, memory: np.ndarray, offset: int, stride: int, shape: tuple[int, int, int], dtype: str, is_v: bool):
        """As Tiles."""
        heads, _, self.head_dim = shape
        self.dtype, self.is_v = dtype, is_v
        size = page_head_bytes(dtype, self.head_dim, is_v=is_v)
        pages = (memory.nbytes - offset - heads * size) // stride + 1
        self.bytes = np.lib.stride_tricks.as_strided(memory[offset:], (pages, heads, size), (stride, size, 1))

    def store(self, page: torch.Tensor, slot: torch.Tensor, x: torch.Tensor) -> None:
        """q8: page, slot: [R]. x: [R][kv_heads][head_dim]."""
        pages, slots = page.numpy(), slot.numpy()
        for p in np.unique(pages):
            rows = pages == p
            for head in range(x.shape[1]):
                store_q8(self.bytes[p, head], slots[rows], x[:, head].numpy()[rows], self.is_v)

    def load(self, pages: list[int]) -> torch.Tensor:
        """As Tiles.load."""
        return torch.from_numpy(decode_page(self.bytes[pages], self.dtype, self.head_dim, self.is_v))


class Half:
    """K or V of a layer: its pages and, for q4, the open page and the first positions, kept exact beside them."""

    def __init__(self, group, index: int, offset: int, side: int, shape: tuple[int, int], dtype: str, is_v: bool):
        """offset: bytes from a page's start. side: bytes from the side memory's start. shape: (kv_heads, head_dim)."""
        heads, dim = shape
        kind = Tiles if dtype in PLAIN else Quantized
        self.pages = kind(group.memory, offset, group.page_stride, (heads, PAGE, dim), dtype, is_v)
        self.is_v, self.exact = is_v, dtype == "q4"
        if self.exact:
            open_bytes, sink_bytes = (2 * heads * slots * dim for slots in (PAGE, SINKS))
            memory, start = group.side, index * group.side_stride + side
            self.open = Tiles(memory[: start + open_bytes], start, open_bytes, (heads, PAGE, dim), "bf16", is_v)
            start += open_bytes
            self.sinks = Tiles(memory[: start + sink_bytes], start, sink_bytes, (heads, SINKS, dim), "bf16", is_v)

    def store(self, page: torch.Tensor, slot: torch.Tensor, x: torch.Tensor) -> None:
        """As Tiles.store; q4 rows go to the open page."""
        if self.exact:
            self.open.store(torch.zeros_like(page), slot, x)
        else:
            self.pages.store(page, slot, x)

    def quantize(self, page: int, base: int, qsq: np.ndarray | None) -> None:
        """q4: the open page, now full, becomes `page`. qsq: [kv_heads][head_dim], for K."""
        full = self.open.load([0])[0].numpy()
        first = SINKS if base == 0 else 0
        if first:
            self.sinks.store(torch.zeros(SINKS, dtype=torch.long), torch.arange(SINKS), torch.from_numpy(full[:, :SINKS]).transpose(0, 1))
        for head, x in enumerate(full):
            self.pages.bytes[page, head] = encode_v_q4(x) if self.is_v else encode_k_q4(x, qsq[head], first)

    def load(self, table: PageTable, own: int) -> torch.Tensor:
        """What rows of the page at position `own` find in the table's pages: float32 [kv_heads][slots][head_dim]."""
        x = self.pages.load(list(table.pages))
        if self.exact:
            for i, base in enumerate(table.base):
                if base == own:
                    x[i] = self.open.load([0])[0]
                elif base == 0:
                    x[i, :, :SINKS] = self.sinks.load([0])[0]
        return x.transpose(0, 1).flatten(1, 2)


class LayerPages:
    """K and V of layer number `index` of a pool's group."""

    def __init__(self, group, index: int, kv_heads: int, head_dim: int):
        shape, start = (kv_heads, head_dim), index * group.layer_stride
        self.k = Half(group, index, start, 0, shape, group.k_dtype, False)
        k_side = 0
        self.qsq = None
        if self.k.exact:
            exact = 2 * kv_heads * (PAGE + SINKS) * head_dim
            k_side = exact + 4 * kv_heads * head_dim
            at = index * group.side_stride
            self.qsq = group.side[at + exact : at + k_side].view(np.float32).reshape(shape)
        self.v = Half(group, index, start + group.v_offset, k_side, shape, group.v_dtype, True)
        self.whole_pages = self.k.exact or self.v.exact

    def append(self, table: PageTable, pos: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores rows of one sequence. pos: [R]. q: [R][heads][head_dim]. k, v: [R][kv_heads][head_dim].

        ValueError for rows of two pages where pages are quantized as a whole.
        """
        base = int(pos[0]) // PAGE * PAGE
        if self.whole_pages and int(pos[-1]) // PAGE * PAGE != base:
            raise ValueError("a step has rows of two pages of a 4-bit cache")
        page, slot = page_of(table)[pos // PAGE], pos % PAGE
        self.k.store(page, slot, k)
        self.v.store(page, slot, v)
        if self.k.exact:
            self._add_squares(slot, q)
        if self.whole_pages and int(slot[-1]) == PAGE - 1:
            for half in (self.k, self.v):
                if half.exact:
                    half.quantize(int(page[0]), base, self.qsq)

    def _add_squares(self, slot: torch.Tensor, q: torch.Tensor) -> None:
        """qsq += q^2, in order of slot, then of query head."""
        squares = np.square(q.numpy().reshape(len(q), len(self.qsq), -1, q.shape[-1]))
        for t, row in zip(slot.tolist(), squares, strict=True):
            if t == 0:
                self.qsq[:] = 0
            for head in range(row.shape[1]):
                self.qsq += row[:, head]

    def load(self, table: PageTable, own: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as Half.load gives them."""
        return self.k.load(table, own), self.v.load(table, own)


def page_of(table: PageTable) -> torch.Tensor:
    """Page number by position / PAGE; -1 where the table has none."""
    pages = torch.full((table.base[-1] // PAGE + 1,), -1, dtype=torch.long)
    pages[torch.tensor(list(table.base)) // PAGE] = torch.tensor(list(table.pages))
    return pages

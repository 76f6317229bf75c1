"""A sequence in a cache of quantized pages: filled through the append op, with what its pages must hold from the reference."""

from __future__ import annotations

import numpy as np

from kvrun.backends import reference_pages as reference
from kvrun.backends.native import DTYPES, lib

from .plans import PAGE, Machine, loaded, pointer, poisoned, stored

SINKS = lib.KV_SINKS


class QuantCache:
    """One layer of a page pool and the side memories of its sequences. Every byte starts as 0xFF: NaN in each format."""

    def __init__(self, n_pages: int, kv_heads: int, head_dim: int, k_dtype: str, v_dtype: str, n_sides: int = 1):
        self.kv_heads, self.head_dim, self.dtypes = kv_heads, head_dim, {"k": k_dtype, "v": v_dtype}
        self.bytes = {w: lib.kv_page_bytes(DTYPES[d], head_dim, w == "v") for w, d in self.dtypes.items()}
        self.v_offset = kv_heads * self.bytes["k"] + 64
        self.stride = self.v_offset + kv_heads * self.bytes["v"] + 128
        self.memory = np.full((n_pages, self.stride), 0xFF, np.uint8)
        self.side_stride = lib.kv_side_bytes(DTYPES[k_dtype], DTYPES[v_dtype], kv_heads, head_dim)
        self.side = np.full((n_sides, self.side_stride), 0xFF, np.uint8)

    def head(self, page: int, head: int, which: str) -> np.ndarray:
        """The bytes of K (V) of one head of a page, a view."""
        start = (self.v_offset if which == "v" else 0) + head * self.bytes[which]
        return self.memory[page, start : start + self.bytes[which]]

    def fields(self) -> dict:
        return {"base": pointer(self.memory, "void *"), "page_stride": self.stride, "v_offset": self.v_offset,
                "side": pointer(self.side if self.side_stride else None, "void *"), "side_stride": self.side_stride,
                "k_dtype": DTYPES[self.dtypes["k"]], "v_dtype": DTYPES[self.dtypes["v"]]}


def chunks(start: int, stop: int, size: int) -> list[range]:
    """Positions in steps of at most `size` that never hold rows of two pages."""
    out = []
    while start < stop:
        end = min(stop, start + size, start // PAGE * PAGE + PAGE)
        out.append(range(start, end))
        start = end
    return out


class Rows:
    """A sequence's rows q, k and v, and what a cache makes of them."""

    def __init__(self, cache: QuantCache, qkv: np.ndarray, heads: int, pages: list[int], side: int = 0, start: int = 0):
        """qkv float32 [n][(heads + 2*kv_heads)*D]: the rows of positions start.. ; start is a multiple of PAGE."""
        self.cache, self.qkv, self.heads, self.start, self.side = cache, qkv, heads, start, side
        self.length = start + len(qkv)
        self.bases = list(range(start, self.length, PAGE))
        self.pages = [pages.pop() for _ in self.bases]
        d = cache.head_dim
        parts = np.split(qkv, [heads * d, (heads + cache.kv_heads) * d], axis=1)
        self.q, self.k, self.v = (p.reshape(len(qkv), -1, d) for p in parts)

    @property
    def table(self):
        return self.pages, self.bases, self.side

    def append(self, machine: Machine, positions, *, prefill: bool = True) -> None:
        rows = self.qkv[positions[0] - self.start : positions[-1] + 1 - self.start].copy()
        op = {"qkv": pointer(rows), "cache": self.cache.fields(), "heads": self.heads, "kv_heads": self.cache.kv_heads,
              "head_dim": self.cache.head_dim}
        machine.run([("append", op)], pos=list(positions), tables=[[self.table]], prefill=prefill)

    def expected_page(self, page: int, head: int, which: str) -> np.ndarray:
        """Bytes of a full page from the reference."""
        base = page * PAGE
        rows = slice(base, base + PAGE)
        x, dtype = (self.k if which == "k" else self.v)[rows, head], self.cache.dtypes[which]
        if dtype == "q8":
            out = np.full(self.cache.bytes[which], 0xFF, np.uint8)
            reference.store_q8(out, np.arange(len(x)), x, which == "v")
            return out
        if which == "v":
            return reference.encode_v_q4(x)
        group = self.heads // self.cache.kv_heads
        qsq = np.zeros(self.cache.head_dim, np.float32)
        with np.errstate(all="ignore"):
            for q in self.q[rows, head * group : (head + 1) * group].reshape(PAGE, group, -1):
                for one in q:
                    qsq += one * one
        return reference.encode_k_q4(x, qsq, SINKS if self.start + base == 0 else 0)

    def values(self, head: int, which: str, pos: int) -> np.ndarray:
        """float64 [length - start][D]: K (V) as a row at `pos` sees them."""
        x, dtype = (self.k if which == "k" else self.v)[:, head], self.cache.dtypes[which]
        if dtype not in ("q8", "q4"):
            return loaded(stored(x, dtype), dtype).astype(np.float64)
        out = reference.bf16(x).astype(np.float64)
        for i, page in enumerate(self.pages):
            base = self.bases[i]
            own = base == pos // PAGE * PAGE
            if base > pos or (dtype == "q4" and own):
                continue
            decoded = reference.decode_page(self.cache.head(page, head, which), dtype, self.cache.head_dim, which == "v")
            first = SINKS if dtype == "q4" and base == 0 else 0
            n = min(PAGE, self.length - base)
            out[base - self.start + first : base - self.start + n] = decoded[first:n]
        return out

    def expected(self, q: np.ndarray, pos: int, scale: float, window: int = 0, softcap: float = 0.0, sinks=None, held=None) -> np.ndarray:
        """q [heads][D] at `pos` -> [heads][D]."""
        p = np.arange(self.start, self.length)
        seen = (p <= pos) & ((pos - p < window) if window else True)
        if held is not None:
            seen &= np.isin(p // PAGE * PAGE, held)
        group, out = self.heads // self.cache.kv_heads, np.empty(q.shape)
        for h in range(len(q)):
            k, v = (self.values(h // group, which, pos)[seen] for which in "kv")
            s = scale * (k @ q[h].astype(np.float64))
            if softcap:
                s = softcap * np.tanh(s / softcap)
            top = max(s.max(), sinks[h] if sinks is not None else -np.inf)
            e = np.exp(s - top)
            out[h] = e @ v / (e.sum() + (np.exp(sinks[h] - top) if sinks is not None else 0))
        return out


def attend(machine: Machine, rows: Rows, q: np.ndarray, positions, *, prefill: bool, scale: float, window: int = 0, softcap: float = 0.0,
           sinks=None, table=None) -> np.ndarray:
    """q [rows][heads][D] -> [rows][heads][D]."""
    n, cache = len(q), rows.cache
    heads, d = rows.heads, cache.head_dim
    qkv = poisoned(n, (heads + 2 * cache.kv_heads) * d)
    qkv[:, : heads * d] = q.reshape(n, -1)
    out = poisoned(n + 1, heads * d)
    op = {"qkv": pointer(qkv), "out": pointer(out), "sinks": pointer(sinks), "cache": cache.fields(), "heads": heads,
          "kv_heads": cache.kv_heads, "head_dim": d, "window": window, "scale": scale, "softcap": softcap}
    machine.run([("attend", op)], pos=list(positions), tables=[[table or rows.table]], prefill=prefill)
    assert np.isnan(out[n:]).all()
    return out[:n].reshape(n, heads, d)

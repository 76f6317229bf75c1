"""Runs small plans through kv_cpu_step over numpy arrays, and lays out cache pages as kernels/page.h says."""

from __future__ import annotations

import weakref

import numpy as np

from kvrun.backends.native import DTYPES, ISAS, ffi, lib

GRANTED = [isa for isa, number in ISAS.items() if number <= lib.kv_cpu_isa()]
PAGE = lib.KV_PAGE
STORED = {"f32": np.uint32, "f16": np.uint16, "bf16": np.uint16}


def random() -> np.random.Generator:
    """A generator seeded anew; pytest shows the seed when the test fails."""
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def poisoned(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, dtype=np.float32)


GIVEN: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()
"""What pointer() was given, by address: for machines whose memory is another."""


def pointer(array: np.ndarray | None, kind: str = "float *"):
    if array is None:
        return ffi.NULL
    assert array.flags.c_contiguous
    GIVEN[array.ctypes.data] = array
    return ffi.cast(kind, array.ctypes.data)


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """The bits of float32 values in a storage format, rounded to nearest even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "f32":
        return values.view(np.uint32)
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def loaded(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The inverse of stored()."""
    if dtype == "f32":
        return bits.view(np.float32)
    if dtype == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rms_error(got: np.ndarray, want: np.ndarray) -> float:
    """Root mean square of got - want, over that of want."""
    return float(np.sqrt(((got.astype(np.float64) - want) ** 2).mean() / (np.asarray(want) ** 2).mean()))


class Cache:
    """One layer of a page pool. Every byte starts as NaN."""

    def __init__(self, n_pages: int, kv_heads: int, head_dim: int, k_dtype: str = "bf16", v_dtype: str = "bf16", group: int = 0):
        self.n_pages, self.kv_heads, self.head_dim = n_pages, kv_heads, head_dim
        self.k_dtype, self.v_dtype, self.group = k_dtype, v_dtype, group
        k_size, v_size = (kv_heads * PAGE * head_dim * STORED[t](0).nbytes for t in (k_dtype, v_dtype))
        self.v_offset, gap = k_size + 64, 128
        self.stride = self.v_offset + v_size + gap
        self.memory = np.full(n_pages * self.stride, 0xFF, dtype=np.uint8)

    def head(self, page: int, head: int, which: str) -> np.ndarray:
        """The bits of K (V) of one head of a page, a writable view of [8][D/2][16][2] (of [64][D][2])."""
        kind = STORED[self.k_dtype if which == "k" else self.v_dtype]
        size = PAGE * self.head_dim * kind(0).nbytes
        start = page * self.stride + (self.v_offset if which == "v" else 0) + head * size
        shape = (PAGE // 16, self.head_dim // 2, 16, 2) if which == "k" else (PAGE // 2, self.head_dim, 2)
        return self.memory[start : start + size].view(kind).reshape(shape)

    def tokens(self, page: int, head: int, which: str) -> np.ndarray:
        """The bits of one head of a page as [128][D], a copy."""
        bits = self.head(page, head, which)
        order = (0, 2, 1, 3) if which == "k" else (0, 2, 1)
        return bits.transpose(order).reshape(PAGE, self.head_dim)

    def put(self, page: int, head: int, which: str, slot: int, values: np.ndarray) -> None:
        """Stores float32 values [n][D] from `slot` on."""
        bits = self.tokens(page, head, which)
        bits[slot : slot + len(values)] = stored(values, self.k_dtype if which == "k" else self.v_dtype)
        if which == "k":
            laid = bits.reshape(PAGE // 16, 16, self.head_dim // 2, 2).transpose(0, 2, 1, 3)
        else:
            laid = bits.reshape(PAGE // 2, 2, self.head_dim).transpose(0, 2, 1)
        self.head(page, head, which)[:] = laid

    def fields(self) -> dict:
        return {"base": pointer(self.memory, "void *"), "page_stride": self.stride, "v_offset": self.v_offset,
                "k_dtype": DTYPES[self.k_dtype], "v_dtype": DTYPES[self.v_dtype], "group": self.group}


class Step:
    """One step as C structs over arrays that it keeps: (kind, fields) ops for rows at positions `pos`.
    tables[group][sequence] = (pages, bases[, side]). ids: the state's arrays by name."""

    def __init__(self, ops: list[tuple[str, dict]], *, pos, seq=None, tables=(), out_row=(), token=None, max_pages: int | None = None) -> None:
        self.rows, self.out = len(pos), len(out_row)
        self.plan = ffi.new("kv_op[]", len(ops))
        for op, (kind, fields) in zip(self.plan, ops, strict=True):
            op.kind, op.layer = getattr(lib, f"KV_OP_{kind.upper()}"), -1
            setattr(op, kind, fields)
        self.ids = {name: np.ascontiguousarray(values, dtype=np.int32) for name, values in
                    {"token": token if token is not None else [0] * self.rows, "pos": pos, "seq": seq if seq is not None else [0] * self.rows,
                     "out_row": list(out_row) or [0], "next": [-7] * max(self.out, 1)}.items()}
        self.n_seqs = len(tables[0]) if tables else int(self.ids["seq"].max()) + 1
        self.tables = ffi.new("kv_table[]", max(1, len(tables) * self.n_seqs))
        self._arrays = []
        given = [table for group in tables for table in group]
        for c_table, (pages, bases, *side) in zip(self.tables, given, strict=bool(tables)):
            self._arrays += [np.array(pages, dtype=np.int32), np.array(bases, dtype=np.int32)]
            if len(pages):
                c_table.page, c_table.base = (pointer(array, "int32_t *") for array in self._arrays[-2:])
            c_table.n_pages, c_table.side = len(pages), side[0] if side else 0
        self.max_pages = max((len(table[0]) for table in given), default=0) if max_pages is None else max_pages
        self.counts = {"n_rows": self.rows, "n_out": self.out, "n_seqs": self.n_seqs, "n_groups": len(tables)}

    def next(self) -> list[int]:
        """What was drawn."""
        return [int(i) for i in self.ids["next"][: self.out]]


class Machine:
    """A kv_cpu. Scratch is exactly what kv_cpu_scratch says, poisoned, with a guard behind it."""

    def __init__(self, isa: str, threads: int) -> None:
        self.isa, self.threads = isa, threads
        self.cpu = lib.kv_cpu_open(ISAS[isa], threads)
        assert self.cpu
        self.appended = 0

    def close(self) -> None:
        lib.kv_cpu_close(self.cpu)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, ops: list[tuple[str, dict]], *, prefill=False, sampler=None, status: int = lib.KV_OK, **given) -> list[int]:
        """Runs a Step of `ops` and `given`. Returns next."""
        step = Step(ops, **given)
        state = ffi.new("kv_state *", {**step.counts, "prefill": prefill, "status": 99, "table": step.tables, "appended": self.appended,
                                       "sampler": ffi.NULL if sampler is None else sampler,
                                       **{name: pointer(ids, "int32_t *") for name, ids in step.ids.items()}})
        size = lib.kv_cpu_scratch(step.plan, len(ops), step.rows, step.max_pages, self.threads, ISAS[self.isa])
        assert size > 0 and size % 64 == 0
        room = np.full(size // 4 + 48, np.nan, dtype=np.float32)
        start = (-room.ctypes.data % 64) // 4
        got = lib.kv_cpu_step(self.cpu, step.plan, len(ops), state, pointer(room[start:], "void *"))
        assert np.isnan(room[start + size // 4 :]).all(), "wrote past its scratch"
        assert np.isnan(room[:start]).all(), "wrote before its scratch"
        assert got == status == state.status
        self.appended = state.appended
        return step.next()

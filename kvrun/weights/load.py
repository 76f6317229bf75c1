"""Packs a model's tensors into the native layouts of kernels/page.h, straight from the file's bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from kvrun.backends.memory import Arena, aligned
from kvrun.backends.native import DTYPES, ffi, lib
from kvrun.backends.plan import Plan, Vector, Weight
from kvrun.errors import ModelError, UsageError
from kvrun.models.spec import TensorRef
from kvrun.weights.source import RawTensor, TensorSource

# What each stored kind becomes in memory: nothing is lost but a rounded scale, and a little of Q5_K and Q6_K (kv_pack in
# kernels/kvrun.h).
_PACKED = {"f32": "f32", "f16": "f16", "bf16": "bf16", "q4_0": "q4s", "q4_1": "q4", "q4_k": "q4", "q5_0": "q8", "q8_0": "q8",
           "q5_k": "q8", "q6_k": "q8"}
# What else the blocks of a kind become as they are, beside others in one matrix.
_ALSO = {"q4_0": "q4"}
# Kinds that have no packed form of their own (GGUF's Q6_K, ...) come dequantized and become this; so do matrices whose
# parts are quantized differently.
_REQUANTIZED = "q8"
WEIGHTS = ("auto", "bf16", "q8", "q4")
"""--weights: as the file has them, or at most so many bits: what is stored in fewer stays as it is."""
_BY_SIZE = ("f32", "f16", "bf16", "q8", "q4", "q4s")
_SLICE_VALUES = 1 << 20
"""Values read and packed at a time."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PackedWeight:
    """Where a Weight of the plan lies in the arena, and in which format."""

    weight: Weight
    dtype: str
    offset: int
    n_bytes: int


def packed_dtype(weight: Weight, source: TensorSource, refs: Mapping[str, TensorRef], weights: str = "auto") -> str:
    """The format that `weight` is held in: that of its parts where they agree, else the widest of theirs; under a
    choice of WEIGHTS, that where it is smaller."""
    kinds = set()
    for name in (refs[part].name for part in weight.parts):
        dequantized = source.stored(name).lower() not in DTYPES
        kinds.add(_REQUANTIZED if dequantized else _PACKED[source.info(name)[0]])
    return smaller(weight, min(kinds, key=_BY_SIZE.index), weights)


def smaller(weight: Weight, dtype: str, weights: str) -> str:
    """What a matrix stored as `dtype` is held in under --weights. The embedding and the head go no lower than 8 bits: in
    4 they cost Gemma 3 270M a quarter of its perplexity."""
    if weights not in WEIGHTS:
        raise UsageError(f"--weights {weights}: choose {', '.join(WEIGHTS)}")
    if weights == "auto":
        return dtype
    least = "q8" if weights == "q4" and weight.name in ("embed", "head") else weights
    return max(dtype, least, key=_BY_SIZE.index)


def layout(plan: Plan, source: TensorSource, refs: Mapping[str, TensorRef], weights: str = "auto") -> list[PackedWeight]:
    """Where every matrix of the plan will lie. weights: one of WEIGHTS. Reads no data."""
    return layout_as(plan, lambda weight: packed_dtype(weight, source, refs, weights))


def layout_as(plan: Plan, dtype_of: Callable[[Weight], str]) -> list[PackedWeight]:
    """Where every matrix of the plan will lie when each is held in the format that dtype_of names."""
    packed, offset = [], 0
    for weight in plan.weights:
        dtype = dtype_of(weight)
        n_bytes = lib.kv_pack_bytes(DTYPES[dtype], weight.n, weight.k)
        if n_bytes < 0:
            raise ModelError(f"{weight.name}: {weight.k} columns, but the kernels need a multiple of {lib.KV_GROUP}")
        packed.append(PackedWeight(weight, dtype, offset, n_bytes))
        offset += aligned(n_bytes)
    return packed


def requantizes(item: PackedWeight, source: TensorSource, refs: Mapping[str, TensorRef]) -> bool:
    """Whether packing computes digits anew, and does not only move the file's."""
    kinds = {source.info(refs[part].name)[0] for part in item.weight.parts}
    return item.dtype in ("q8", "q4") and not all(_moves(kind, item.dtype) for kind in kinds)


def _moves(kind: str, dtype: str) -> bool:
    """Whether what is stored as `kind` becomes `dtype` without computing digits anew."""
    return dtype in (_PACKED[kind], _ALSO.get(kind))


def weight_bytes(packed: list[PackedWeight]) -> int:
    """Bytes of the arena that holds `packed`."""
    return sum(aligned(p.n_bytes) for p in packed)


def read_part(source: TensorSource, ref: TensorRef) -> RawTensor:
    """The tensor that `ref` names, with a GGUF q/k projection's rows put back into Hugging Face order."""
    raw = source.read(ref.name, ref.start, ref.stop)
    if not ref.unpermute_heads:
        return raw
    # GGUF stores rows of a head as (half, 2) for neighbour-paired RoPE; Hugging Face pairs row i with i + half.
    rows = np.frombuffer(raw.data, dtype=np.uint8).reshape(ref.unpermute_heads, raw.shape[0] // ref.unpermute_heads // 2, 2, -1)
    data = np.ascontiguousarray(rows.swapaxes(1, 2))
    return RawTensor(raw.name, raw.dtype, raw.shape, data.reshape(-1))


def as_float32(raw: RawTensor) -> np.ndarray:
    """The tensor's values as float32, of its own shape."""
    data = np.frombuffer(raw.data, dtype=np.uint8)
    if raw.dtype == "f32":
        return data.view(np.float32).reshape(raw.shape)
    if raw.dtype == "f16":
        return data.view(np.float16).astype(np.float32).reshape(raw.shape)
    if raw.dtype == "bf16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(raw.shape)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[raw.dtype.upper()]
    return dequantize(data.reshape(raw.shape[0], -1), kind).reshape(raw.shape)


@dataclass(frozen=True)
class _Slice:
    """`rows` rows of the tensor of one part, from its row `start` on; they become the matrix' rows from `row` on."""

    item: PackedWeight
    part: str
    start: int
    rows: int
    row: int


def _slices(packed: list[PackedWeight], source: TensorSource, refs: Mapping[str, TensorRef]) -> Iterator[list[_Slice]]:
    """The work of packing, as jobs that may run side by side: slices of about _SLICE_VALUES, so that what is read at a
    time stays small, or a whole matrix where a slice would share a block of 16 rows with its neighbour."""
    for item in packed:
        job, row, aligned_rows = [], 0, True
        for part in item.weight.parts:
            ref = refs[part]
            stop = source.info(ref.name)[1][0] if ref.stop is None else ref.stop
            rows = stop - ref.start
            aligned_rows &= row % lib.KV_LANES == 0
            step = rows  # heads are put back in order as a whole
            if not ref.unpermute_heads:
                step = max(1, _SLICE_VALUES // (item.weight.k * lib.KV_LANES)) * lib.KV_LANES
            for start in range(0, rows, step):
                job.append(_Slice(item, part, ref.start + start, min(step, rows - start), row + start))
            row += rows
        if row != item.weight.n:
            raise ModelError(f"{item.weight.name}: {row} rows in the file, {item.weight.n} in the config")
        if aligned_rows:
            yield from ([one] for one in job)
        else:
            yield job


def pack(packed: list[PackedWeight], arena: Arena, source: TensorSource, refs: Mapping[str, TensorRef],
         threads: int, progress: Progress | None = None) -> None:
    """Reads and packs every matrix into `arena`, `threads` jobs at a time. progress(values done, values in all)."""
    todo = _slices(packed, source, refs)
    lock = threading.Lock()
    done, total = 0, sum(p.weight.n * p.weight.k for p in packed)
    failures: list[BaseException] = []

    def work() -> None:
        nonlocal done
        try:
            while not failures:
                with lock:
                    job = next(todo, None)
                if job is None:
                    return
                for piece in job:
                    _pack_slice(piece, arena, source, refs)
                with lock:
                    done += sum(piece.rows * piece.item.weight.k for piece in job)
                    if progress:
                        progress(done, total)
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            failures.append(error)

    workers = [threading.Thread(target=work, name="kvrun-pack") for _ in range(threads - 1)]
    for worker in workers:
        worker.start()
    work()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


def _pack_slice(piece: _Slice, arena: Arena, source: TensorSource, refs: Mapping[str, TensorRef]) -> None:
    item = piece.item
    target = ffi.new("kv_weight *", {"data": ffi.cast("void *", arena.address + item.offset), "dtype": DTYPES[item.dtype],
                                     "n": item.weight.n, "k": item.weight.k})
    raw = read_part(source, replace(refs[piece.part], start=piece.start, stop=piece.start + piece.rows))
    if not _moves(raw.dtype, item.dtype) and raw.dtype not in ("f32", "f16", "bf16"):  # kv_pack requantizes no blocks
        raw = RawTensor(raw.name, "f32", raw.shape, np.ascontiguousarray(as_float32(raw)).view(np.uint8).reshape(-1))
    if lib.kv_pack(target, piece.row, piece.rows, ffi.from_buffer(raw.data), DTYPES[raw.dtype]) != lib.KV_OK:
        raise ModelError(f"{raw.name}: cannot pack {raw.dtype} {raw.shape} as {item.dtype}")


def read_vector(vector: Vector, source: TensorSource, refs: Mapping[str, TensorRef]) -> np.ndarray:
    """float32 [dim]: the parts of `vector`, one after the other, each with its ref's `add`."""
    parts = [as_float32(read_part(source, refs[p])).reshape(-1) + np.float32(refs[p].add) for p in vector.parts]
    values = np.concatenate(parts).astype(np.float32)
    if values.size != vector.dim:
        raise ModelError(f"{vector.name}: {values.size} values in the file, {vector.dim} in the config")
    return values

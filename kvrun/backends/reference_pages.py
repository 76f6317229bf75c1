"""What the Q8 and Q4 cache pages of kernels/page.h mean, to the bit, in numpy. Read it beside that header.

Rules that hold everywhere:
- Arithmetic is float32 unless a line says float64; every operation is rounded by itself (nothing fused, no reciprocals)
  and sums run in the order given.
- bf16() rounds to nearest, ties to even; a subnormal bfloat16 counts as zero. Beyond that no result depends on
  whether float32 subnormals are kept or flushed: what they could change is far below the smallest scale.
- f16() clamps to +-65504, rounds to nearest, ties to even, keeps subnormal halves, and has no negative zero. A scale
  is zero when f16() makes it zero; a subnormal scale is a scale like any other.
- Where a value that decides a scale is not finite, scale (and zero) are the NaN 0x7E00 and the codes 0: damage spreads
  to the logits, where it is noticed, and is never rounded away.
"""

from __future__ import annotations

import numpy as np

from kvrun.cache.formats import LANES, PAGE, page_head_bytes, q4_group, q8_group

F16_MAX = np.float32(65504)
TINY = np.float32(2.0**-126)        # the smallest normal float32
ROUNDS = 3                          # least-squares fits of scale and zero of a Q4 K channel
COST = np.array([1.0] + [1.0 / (2**b - 1) ** 2 for b in range(1, 9)])
"""float64 [9]: squared error of a b-bit grid relative to that of storing the middle of the range."""


def bf16(x: np.ndarray) -> np.ndarray:
    """x rounded to bfloat16, as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), np.where(np.abs(rounded) < TINY, np.float32(0), rounded))


def f16(x: np.ndarray) -> np.ndarray:
    """x as float16."""
    return np.clip(np.asarray(x, np.float32), -F16_MAX, F16_MAX).astype(np.float16) + np.float16(0)


def rotate(x: np.ndarray) -> np.ndarray:
    """The orthonormal Walsh-Hadamard transform of each block of B channels (last axis), B the largest power of two
    that divides their number: butterflies of stride 1, 2, 4, ..., then one multiplication by 1/sqrt(B)."""
    d = x.shape[-1]
    block = d & -d
    y = np.array(x, np.float32).reshape(-1, block)
    stride = 1
    while stride < block:
        a, b = np.moveaxis(y.reshape(-1, block // (2 * stride), 2, stride), 2, 0)
        y = np.stack([a + b, a - b], axis=2).reshape(-1, block)
        stride *= 2
    return (y * np.float32(1 / np.sqrt(block))).reshape(x.shape)


def _codes(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, top: np.ndarray | float) -> np.ndarray:
    """clamp(rint((x - zero) / scale), 0, top), float32; 0 where scale is zero or not a number."""
    s = scale.astype(np.float32)
    good = s > 0
    with np.errstate(all="ignore"):
        code = np.clip(np.rint((x - zero.astype(np.float32)) / np.where(good, s, np.float32(1))), 0, top)
    return np.where(good, code, np.float32(0)).astype(np.float32)


# ---- Q8: token by token ----

def encode_q8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows x [n][D] -> codes int8 [n][D], scales float16 [n][D/G]."""
    n, d = x.shape
    with np.errstate(all="ignore"):
        y = rotate(bf16(x)).reshape(n, -1, q8_group(d))
        top = np.abs(y).max(axis=2)
        scale = f16(np.where(np.isfinite(top), top / np.float32(127), np.float32(np.nan)))
        s = scale.astype(np.float32)[..., None]
        good = s > 0
        codes = np.clip(np.rint(y / np.where(good, s, np.float32(1))), -127, 127)
    return np.where(good, codes, 0).astype(np.int8).reshape(n, d), scale


def _q8_parts(page: np.ndarray, head_dim: int, is_v: bool) -> tuple[np.ndarray, np.ndarray]:
    """Views of a page uint8 [...][bytes], indexed by token: codes int8 [...][128/n][n][D/4][4], scales float16 [...][128/n][n][D/G],
    n tokens being side by side; codes of V are [...][32][4][D/16][16]."""
    lead, n = page.shape[:-1], PAGE * head_dim
    codes, scale = page[..., :n].view(np.int8), page[..., n:].view(np.float16)
    if is_v:
        return (np.moveaxis(codes.reshape(*lead, head_dim // LANES, PAGE // 4, LANES, 4), (-3, -1), (-4, -3)),
                np.moveaxis(scale.reshape(*lead, -1, PAGE // 4, 4), -3, -1))
    return (codes.reshape(*lead, PAGE // LANES, head_dim // 4, LANES, 4).swapaxes(-2, -3),
            scale.reshape(*lead, PAGE // LANES, -1, LANES).swapaxes(-1, -2))


def store_q8(page: np.ndarray, slots: np.ndarray, x: np.ndarray, is_v: bool) -> None:
    """Quantizes rows x [n][D] into `slots` [n] of one head's page, uint8 [bytes], in place."""
    n = 4 if is_v else LANES
    for part, value in zip(_q8_parts(page, x.shape[1], is_v), encode_q8(x), strict=True):
        part[slots // n, slots % n] = value.reshape(len(x), *part.shape[2:])


def decode_q8(page: np.ndarray, head_dim: int, is_v: bool) -> np.ndarray:
    """uint8 [...][bytes] -> float32 [...][128][D]."""
    codes, scale = (p.reshape(*page.shape[:-1], PAGE, -1) for p in _q8_parts(page, head_dim, is_v))
    s = np.repeat(scale.astype(np.float32), q8_group(head_dim), axis=-1)
    with np.errstate(all="ignore"):
        return rotate(codes.astype(np.float32) * s)


# ---- Q4 of K: a page at a time ----

def pair_channels(importance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """importance float64 [D] -> chan uint8 [D/2][2] (high, low), split uint8 [D/2].

    Channels are sorted by falling importance, ties by rising number; the first is paired with the last, the second
    with the one before the last, and so on. A pair's split s is the one of 4..8 with the least
    w[high]*COST[s] + w[low]*COST[8-s], in float64; ties take the smaller s.
    """
    d = len(importance)
    order = np.argsort(-importance, kind="stable")
    high, low = order[: d // 2], order[d // 2:][::-1]
    errors = [importance[high] * COST[s] + importance[low] * COST[8 - s] for s in range(4, 9)]
    split = 4 + np.argmin(errors, axis=0)       # the first of equals
    return np.stack([high, low], axis=1).astype(np.uint8), split.astype(np.uint8)


def _sum64(x: np.ndarray) -> np.ndarray:
    """Sum over the slots, in their order, in float64."""
    return np.cumsum(x, axis=0, dtype=np.float64)[-1]


def _fit_k(k: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """k float32 [128][D] (bfloat16 values), bits [D] -> codes uint8 [128][D], scale and zero float16 [D].

    A min/max grid first: scale f16(range / top), zero f16(min), top = 2^bits - 1. Where bits or scale are 0: scale 0,
    zero f16(min + 0.5*range), codes 0. Then ROUNDS times: the least-squares scale and zero for the codes, and the codes
    for them. A fit whose scale is no positive half, or whose codes are all equal, is not taken.
    """
    low, high = k.min(axis=0), k.max(axis=0)
    span = high - low
    top = (2.0**bits - 1).astype(np.float32)
    scale = np.where(bits > 0, f16(span / np.maximum(top, np.float32(1))), np.float16(0))
    zero = np.where(scale > 0, f16(low), f16(low + np.float32(0.5) * span))
    damaged = ~np.isfinite(k).all(axis=0)
    scale[damaged] = zero[damaged] = np.float16(np.nan)

    code = _codes(k, scale, zero, top)
    n, x = float(PAGE), k.astype(np.float64)
    for _ in range(ROUNDS):
        c = code.astype(np.float64)
        sc, sx, scc, scx = _sum64(c), _sum64(x), _sum64(c * c), _sum64(c * x)
        variance = n * scc - sc * sc
        new = f16(((n * scx - sc * sx) / np.where(variance > 0, variance, 1.0)).astype(np.float32))
        taken = (scale > 0) & (variance > 0) & (new > 0)
        scale = np.where(taken, new, scale)
        zero = np.where(taken, f16(((sx - scale.astype(np.float64) * sc) / n).astype(np.float32)), zero)
        code = _codes(k, scale, zero, top)
    return code.astype(np.uint8), scale, zero


def encode_k_q4(k: np.ndarray, qsq: np.ndarray, first: int) -> np.ndarray:
    """One head's full page: k [128][D] after RoPE, qsq float32 [D] as page.h defines it -> uint8 [bytes].

    first: slots that the side memory keeps (KV_SINKS in the page of position 0, else 0). They take the value of slot
    `first` here, so that they widen no range. importance is (qsq * range) * range in float64, range = max - min in
    float64; an importance that is not finite counts as 0. Padding is 0.
    """
    d = k.shape[1]
    k = bf16(k)
    k[:first] = k[first]
    with np.errstate(all="ignore"):
        span = k.max(axis=0).astype(np.float64) - k.min(axis=0).astype(np.float64)
        importance = np.asarray(qsq, np.float64) * span * span
        chan, split = pair_channels(np.where(np.isfinite(importance), importance, 0.0))
        bits = np.empty(d)
        bits[chan[:, 0]], bits[chan[:, 1]] = split, 8 - split
        code, scale, zero = _fit_k(k, bits)

    page = np.zeros(page_head_bytes("q4", d, is_v=False), np.uint8)
    shift = (8 - split).astype(np.uint16)[:, None]
    pairs = (code.T[chan[:, 0]].astype(np.uint16) << shift | code.T[chan[:, 1]]).astype(np.uint8)   # [D/2][128]
    parts = (pairs.reshape(d // 8, 4, PAGE // LANES, LANES).transpose(2, 0, 3, 1), scale, zero, chan, split)
    content = b"".join(p.tobytes() for p in parts)
    page[: len(content)] = np.frombuffer(content, np.uint8)
    return page


def k_q4_parts(page: np.ndarray, head_dim: int) -> dict[str, np.ndarray]:
    """Views of one head's page, uint8 [bytes]: pair [8][D/8][16][4], scale [D], zero [D], chan [D/2][2], split [D/2]."""
    d, parts, start = head_dim, {}, 0
    for name, dtype, shape in (("pair", np.uint8, (PAGE // LANES, d // 8, LANES, 4)), ("scale", np.float16, (d,)),
                               ("zero", np.float16, (d,)), ("chan", np.uint8, (d // 2, 2)), ("split", np.uint8, (d // 2,))):
        end = start + int(np.prod(shape)) * np.dtype(dtype).itemsize
        parts[name], start = page[start:end].view(dtype).reshape(shape), end
    return parts


def decode_k_q4(page: np.ndarray, head_dim: int) -> np.ndarray:
    """uint8 [...][bytes] -> float32 [...][128][D]."""
    flat = page.reshape(-1, page.shape[-1])
    k = np.empty((len(flat), PAGE, head_dim), np.float32)
    for out, one in zip(k, flat, strict=True):
        p = k_q4_parts(one, head_dim)
        low_bits = 8 - p["split"].astype(np.uint16)
        pair = p["pair"].swapaxes(1, 2).reshape(PAGE, -1)
        out[:, p["chan"][:, 0]] = pair >> low_bits
        out[:, p["chan"][:, 1]] = pair & ((1 << low_bits) - 1)
        with np.errstate(all="ignore"):
            out[:] = out * p["scale"].astype(np.float32) + p["zero"].astype(np.float32)
    return k.reshape(*page.shape[:-1], PAGE, head_dim)


# ---- Q4 of V: row by row, though a page at a time ----

def encode_v_q4(v: np.ndarray) -> np.ndarray:
    """One head's full page: v [128][D] -> uint8 [bytes]. Groups, scale, zero and codes as page.h says."""
    d = v.shape[1]
    with np.errstate(all="ignore"):
        y = rotate(bf16(v)).reshape(PAGE, -1, q4_group(d))
        low, span = y.min(axis=2), y.max(axis=2) - y.min(axis=2)
        scale = f16(span / np.float32(15))
        zero = np.where(scale > 0, f16(low), f16(low + np.float32(0.5) * span))
    damaged = ~np.isfinite(y).all(axis=2)
    scale[damaged] = zero[damaged] = np.float16(np.nan)
    code = _codes(y, scale[..., None], zero[..., None], 15).astype(np.uint8).reshape(PAGE // 8, 2, 4, d)
    nibble = (code[:, 0] | code[:, 1] << 4).reshape(PAGE // 8, 4, d // LANES, LANES)
    parts = (nibble.transpose(2, 0, 3, 1), scale.T, zero.T)
    return np.frombuffer(b"".join(p.tobytes() for p in parts), np.uint8).copy()


def decode_v_q4(page: np.ndarray, head_dim: int) -> np.ndarray:
    """uint8 [...][bytes] -> float32 [...][128][D]."""
    lead, n = page.shape[:-1], PAGE * head_dim // 2
    nibble = page[..., :n].reshape(*lead, head_dim // LANES, PAGE // 8, LANES, 4)
    nibble = np.moveaxis(nibble, (-3, -1), (-4, -3)).reshape(*lead, PAGE // 8, 4, head_dim)
    code = np.stack([nibble & 15, nibble >> 4], axis=-3).reshape(*lead, PAGE, -1, q4_group(head_dim))
    numbers = page[..., n:].view(np.float16).astype(np.float32).reshape(*lead, 2, -1, PAGE)
    scale, zero = np.moveaxis(numbers.swapaxes(-1, -2)[..., None], len(lead), 0)
    with np.errstate(all="ignore"):
        return rotate((code.astype(np.float32) * scale + zero).reshape(*lead, PAGE, head_dim))


def decode_page(page: np.ndarray, dtype: str, head_dim: int, is_v: bool) -> np.ndarray:
    """Quantized pages of any kind: uint8 [...][bytes] -> float32 [...][128][D]."""
    if dtype == "q8":
        return decode_q8(page, head_dim, is_v)
    return decode_v_q4(page, head_dim) if is_v else decode_k_q4(page, head_dim)

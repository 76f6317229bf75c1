"""What a cache page and a side memory look like in bytes. The layouts themselves are defined in kernels/page.h."""

from __future__ import annotations

from dataclasses import dataclass

from kvrun.backends.plan import CacheGroup
from kvrun.errors import UsageError

PAGE = 128
"""Token slots of a page: KV_PAGE of kernels/kvrun.h."""
SHORTEST_KEPT = 2 * PAGE
"""Prompts below this many tokens are computed sooner than they are read from disk."""
LANES = 16
"""Tokens of a K block: KV_LANES."""
SINKS = 16
"""First positions of a sequence that a q4 cache keeps in 16 bits: KV_SINKS."""

KV_FORMATS = ("f16", "f32", "q8", "q4")
"""What --kv takes, for K and V alike or as K/V."""
KV_CHOICES = ("f16", "f32", "q8", "q8/q4", "q4")
"""What `plan` and `compare` show unasked."""

_PLAIN_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
_QUANTIZED = ("q8", "q4")
_MAX_HEAD = 256         # KV_MAX_QUANT_DIM: a channel's number is one byte of a K page


def q8_group(head_dim: int) -> int:
    """Channels that share a scale in a Q8 page."""
    return 32 if head_dim % 32 == 0 else 16


def q4_group(head_dim: int) -> int:
    """Channels that share a scale and a zero in a Q4 page of V."""
    return 64 if head_dim % 64 == 0 else head_dim


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // 64) * 64


def page_head_bytes(dtype: str, head_dim: int, *, is_v: bool) -> int:
    """Bytes of K or V of one head in one page stored as `dtype`: kv_page_bytes."""
    values = PAGE * head_dim
    if dtype == "q8":
        return values + 2 * values // q8_group(head_dim)
    if dtype == "q4" and is_v:
        return values // 2 + 4 * values // q4_group(head_dim)
    if dtype == "q4":
        return _aligned(values // 2 + 5 * head_dim + head_dim // 2)
    return values * _PLAIN_BYTES[dtype]


def side_bytes(k_dtype: str, v_dtype: str, kv_heads: int, head_dim: int) -> int:
    """Bytes of one layer's side memory of one sequence: kv_side_bytes. 0 without q4."""
    exact = 2 * (PAGE + SINKS) * head_dim       # a head's open page and first positions, bfloat16
    k = exact + 4 * head_dim if k_dtype == "q4" else 0
    return _aligned(kv_heads * (k + (exact if v_dtype == "q4" else 0)))


def resolve_kv(kv: str, model_dtype: str) -> tuple[str, str]:
    """--kv -> storage formats of K and V. "f16" is the model's own 16-bit format: float16 for float16 models, else
    bfloat16, whose range every model trained in bfloat16 may use. Raises UsageError for what is no format."""
    parts = kv.split("/")
    if not 1 <= len(parts) <= 2 or not all(p in KV_FORMATS for p in parts):
        raise UsageError(f"--kv {kv}: no such cache format; choose one of {', '.join(KV_FORMATS)}, or two for K and V, like q8/q4")
    half = "f16" if model_dtype == "float16" else "bf16"
    k, v = (half if p == "f16" else p for p in (parts[0], parts[-1]))
    if "f32" in (k, v) and k != v:
        raise UsageError(f"--kv {kv}: f32 goes with no other format; choose f32 alone")
    return k, v


def kv_name(kv: tuple[str, str]) -> str:
    """The --kv that means these storage formats."""
    names = ["f16" if f == "bf16" else f for f in kv]
    return names[0] if names[0] == names[1] else "/".join(names)


def check_head_dim(kv: tuple[str, str], head_dim: int) -> None:
    """UsageError when no page of these formats can hold heads of `head_dim` channels."""
    quantized = [f for f in kv if f in _QUANTIZED]
    if quantized and (head_dim % 16 or head_dim > _MAX_HEAD):
        raise UsageError(f"--kv {kv_name(kv)}: this model has heads of {head_dim} channels, and a quantized page takes a "
                         f"multiple of 16 up to {_MAX_HEAD}; use --kv f16")


@dataclass(frozen=True)
class GroupLayout:
    """Bytes of one group's pages. Layer l of page p starts at p*page_stride + l*layer_stride, with K first. The side
    memory of layer l starts at l*side_stride after all pages."""

    k_dtype: str
    v_dtype: str
    n_pages: int
    v_offset: int
    layer_stride: int
    page_stride: int
    side_stride: int
    n_layers: int

    @property
    def page_bytes(self) -> int:
        """All pages of the group."""
        return self.n_pages * self.page_stride

    @property
    def side_bytes(self) -> int:
        """The side memory of one sequence in all layers of the group."""
        return self.n_layers * self.side_stride

    @property
    def n_bytes(self) -> int:
        """All pages of the group, and the side memory."""
        return self.page_bytes + self.side_bytes


def group_layout(group: CacheGroup, k_dtype: str, v_dtype: str, n_pages: int) -> GroupLayout:
    """Layout of `n_pages` pages of `group` and of one sequence's side memory."""
    v_offset = group.kv_heads * page_head_bytes(k_dtype, group.head_dim, is_v=False)
    layer_stride = v_offset + group.kv_heads * page_head_bytes(v_dtype, group.head_dim, is_v=True)
    side = side_bytes(k_dtype, v_dtype, group.kv_heads, group.head_dim)
    return GroupLayout(k_dtype, v_dtype, n_pages, v_offset, layer_stride, layer_stride * len(group.layers), side, len(group.layers))

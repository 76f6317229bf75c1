"""What a cache page looks like in bytes. The layouts themselves are defined in kernels/page.h."""

from __future__ import annotations

from dataclasses import dataclass

from kvrun.backends.plan import CacheGroup
from kvrun.errors import UsageError

PAGE = 128
"""Token slots of a page: KV_PAGE of kernels/kvrun.h."""

_BYTES_PER_VALUE = {"f32": 4, "f16": 2, "bf16": 2}
KV_CHOICES = ("f16", "f32")
"""What --kv takes."""


def page_head_bytes(dtype: str, head_dim: int) -> int:
    """Bytes of K (or of V: the same) of one head in one page stored as `dtype`."""
    return PAGE * head_dim * _BYTES_PER_VALUE[dtype]


def resolve_kv(kv: str, model_dtype: str) -> tuple[str, str]:
    """--kv -> storage formats of K and V. "f16" is the model's own 16-bit format: float16 for float16 models, else
    bfloat16, whose range every model trained in bfloat16 may use. Raises UsageError for a format that is not built."""
    if kv == "f32":
        return "f32", "f32"
    if kv == "f16":
        dtype = "f16" if model_dtype == "float16" else "bf16"
        return dtype, dtype
    raise UsageError(f"--kv {kv}: no such cache format; choose one of {', '.join(KV_CHOICES)}")


@dataclass(frozen=True)
class GroupLayout:
    """Bytes of one group's pages. Layer l of page p starts at p*page_stride + l*layer_stride, with K first."""

    k_dtype: str
    v_dtype: str
    n_pages: int
    v_offset: int
    layer_stride: int
    page_stride: int

    @property
    def n_bytes(self) -> int:
        """All pages of the group."""
        return self.n_pages * self.page_stride


def group_layout(group: CacheGroup, k_dtype: str, v_dtype: str, n_pages: int) -> GroupLayout:
    """Layout of `n_pages` pages of `group`."""
    v_offset = group.kv_heads * page_head_bytes(k_dtype, group.head_dim)
    layer_stride = v_offset + group.kv_heads * page_head_bytes(v_dtype, group.head_dim)
    return GroupLayout(k_dtype, v_dtype, n_pages, v_offset, layer_stride, layer_stride * len(group.layers))

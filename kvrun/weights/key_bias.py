"""Which cache formats a model really gets: K stays at 8 bits where the weights show that 4 would not do."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvrun.cache.formats import check_head_dim, kv_name, resolve_kv
from kvrun.errors import ModelError
from kvrun.models.spec import ModelSpec, TensorRef
from kvrun.weights.source import RawTensor, TensorSource

KEY_BIAS_LIMIT = 32.0
"""The largest bias of K that 4-bit pages take. RoPE turns a bias b into a swing of 2|b| within a page, and a channel's
4-bit step is a 15th of that. Models without such biases have swings of up to about 60 and lose nothing that matters;
Qwen 2 and 2.5 have biases of a hundred and more."""


def largest_key_bias(spec: ModelSpec, refs: Mapping[str, TensorRef], source: TensorSource) -> float:
    """max |bias| of K over all layers; 0 for a model without."""
    if not spec.qkv_bias:
        return 0.0
    parts = [refs[f"layers.{i}.k_bias"] for i in range(len(spec.layers))]
    return max(float(np.abs(_values(source.read(p.name, p.start, p.stop))).max()) for p in parts)


def _values(raw: RawTensor) -> np.ndarray:
    """A vector as float32. Files hold vectors as plain numbers, whatever they do with matrices."""
    data = np.frombuffer(raw.data, np.uint8)
    if raw.dtype == "bf16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if raw.dtype not in ("f32", "f16"):
        raise ModelError(f"{raw.name}: a bias stored as {raw.dtype}; convert the model with its vectors in float32")
    return data.view(np.float32 if raw.dtype == "f32" else np.float16).astype(np.float32)


def choose_formats(kv: str, spec: ModelSpec, refs: Mapping[str, TensorRef], source: TensorSource | None) -> tuple[tuple[str, str], str | None]:
    """--kv -> formats of K and V, and what the user must be told (or None). Reads K's biases alone, and those only
    where K is to have 4 bits; source None: no weights are here. UsageError for a format that is none or does not fit."""
    formats = resolve_kv(kv, spec.dtype)
    check_head_dim(formats, spec.head_dim)
    if formats[0] != "q4" or source is None:
        return formats, None
    bias = largest_key_bias(spec, refs, source)
    if not bias > KEY_BIAS_LIMIT:
        return formats, None
    kept = ("q8", formats[1])
    return kept, f"--kv {kv}: this model's keys have a bias of {bias:.0f}, too far out for 4 bits; K stays at 8 ({kv_name(kept)})"

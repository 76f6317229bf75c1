"""Which tensor of a file is which of the model: canonical name -> TensorRef, and whether the file really has them."""

from __future__ import annotations

import re
from typing import Iterator

from kvrun.errors import ModelError, show
from kvrun.models.family import GGUF_NAMES, Family
from kvrun.models.load import find_family
from kvrun.models.spec import ModelSpec, TensorRef
from kvrun.weights.source import TensorSource

FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


def canonical_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that the model has, by canonical name, with its shape."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    layer: dict[str, tuple[int, ...]] = {}
    if spec.pre_norm:
        layer |= {"attn_norm": (spec.hidden,), "mlp_norm": (spec.hidden,)}
    if spec.post_norm:
        layer |= {"attn_post_norm": (spec.hidden,), "mlp_post_norm": (spec.hidden,)}
    if spec.qk_norm != "none":
        whole = spec.qk_norm == "whole"
        layer |= {"q_norm": (q if whole else spec.head_dim,), "k_norm": (kv if whole else spec.head_dim,)}
    matrices = {"q": (q, spec.hidden), "k": (kv, spec.hidden), "v": (kv, spec.hidden), "o": (spec.hidden, q),
                "gate": (spec.ffn, spec.hidden), "up": (spec.ffn, spec.hidden), "down": (spec.hidden, spec.ffn)}
    for name, shape in matrices.items():
        layer[name] = shape
        if spec.qkv_bias if name in "qkv" else spec.o_bias if name == "o" else spec.mlp_bias:
            layer[f"{name}_bias"] = shape[:1]
    shapes = {"embed": (spec.vocab_size, spec.hidden)}
    for i in range(len(spec.layers)):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["norm"] = (spec.hidden,)
    if not spec.tied:
        shapes["head"] = (spec.vocab_size, spec.hidden)
    return shapes


def tensor_refs(spec: ModelSpec, config: dict, kind: str) -> dict[str, TensorRef]:
    """Canonical name -> where it lies. kind: "folder" (Hugging Face names) or "gguf" (llama.cpp's names and row order).

    A tied model has no "head". Tensors are neither opened nor looked for: see check_tensors.
    """
    _, family = find_family(config, "the config")
    if kind not in ("folder", "gguf"):
        raise ValueError(f"no such kind of source: {kind!r}")
    gguf = kind == "gguf"
    shapes = canonical_shapes(spec)
    return {name: _ref(name, shapes, spec, family, gguf) for name in shapes}


def _ref(name: str, shapes: dict, spec: ModelSpec, family: Family, gguf: bool) -> TensorRef:
    _, _, rest = name.partition("layers.")
    layer, _, leaf = rest.rpartition(".")
    leaf = leaf or name
    base, suffix = (leaf.removesuffix("_bias"), ".bias") if leaf.endswith("_bias") else (leaf, ".weight")
    prefix = (f"blk.{layer}." if gguf else family.layer_prefix.format(i=layer)) if layer else ""

    fused = family.gguf_fused if gguf else family.fused
    for whole, parts in FUSED.items():
        if base in parts and whole in fused:
            start = sum(shapes[f"layers.{layer}.{p}"][0] for p in parts[:parts.index(base)])
            return TensorRef(prefix + fused[whole] + suffix, start, start + shapes[f"layers.{layer}.{base}"][0])
    names = GGUF_NAMES if gguf else family.names
    heads = {"q": spec.heads, "k": spec.kv_heads}.get(base, 0)
    return TensorRef(
        prefix + names[base] + suffix,
        unpermute_heads=heads if gguf and family.gguf_permuted else 0,
        add=family.gguf_norm_add if gguf and base.endswith("norm") else 0.0,
    )


def check_tensors(spec: ModelSpec, refs: dict[str, TensorRef], source: TensorSource, where: str = "the weights") -> None:
    """Every tensor is there, of the right shape, and no layer holds one that this model would leave unused.

    ModelError names the tensor. Reads no data. where: the folder or file, for messages.
    """
    names = set(source.names())
    wanted: dict[str, tuple[int, ...]] = {}
    for canonical, shape in canonical_shapes(spec).items():
        ref = refs[canonical]
        rows = max(ref.stop or shape[0], wanted.get(ref.name, (0,))[0])
        wanted[ref.name] = (rows, *shape[1:])
    for name, shape in wanted.items():
        if name not in names:
            raise ModelError(f"{where}: tensor {show(name)} is missing; fetch the model again")
        found = tuple(source.info(name)[1])
        if found != shape:
            raise ModelError(f"{where}: tensor {show(name)} has shape {list(found)}, not {list(shape)} as the config says")
    for name in sorted(_unused(names - set(wanted), refs)):
        raise ModelError(f"{where}: tensor {show(name)} has no place in a model of kind {spec.architecture}")


def _unused(names: set[str], refs: dict[str, TensorRef]) -> Iterator[str]:
    """Tensors beside the wanted ones, inside the decoder, that would change what the model computes."""
    inside = [re.escape(refs["layers.0.down"].name.partition("0.")[0]) + r"\d+\."]
    if refs["embed"].name == "token_embd.weight":
        inside.append(r"output\.(weight|bias)")
    pattern = re.compile("|".join(inside))
    constants = re.compile(r"rotary_emb\.inv_freq$|attn_rot_embd\.|masked_bias$")
    return (name for name in names if pattern.match(name) and not constants.search(name))

"""ModelSpec: everything the decoder needs to know of a model, read from its config.json, with no default invented."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeSpec:
    """One rotary table. inv_freq: [dim/2] inverse frequencies after scaling. dim: rotated channels of a head.

    attention_factor multiplies cos and sin (YaRN, LongRoPE). interleaved: channel pairs (2i, 2i+1), else (i, i+dim/2).
    """

    inv_freq: tuple[float, ...]
    dim: int
    attention_factor: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """One layer. window: 0 is full attention, else positions seen, itself included. rope: index or None (NoPE)."""

    window: int = 0
    rope: int | None = 0


@dataclass(frozen=True)
class TensorRef:
    """Where a canonical tensor lies: rows [start, stop) of the file's tensor `name` (stop None: all).

    unpermute_heads: 0, or the head count of a q/k projection whose rows GGUF stores in interleaved order.
    add: what is added to every value (GGUF stores Gemma's norm weights with their 1 already added: -1).
    """

    name: str
    start: int = 0
    stop: int | None = None
    unpermute_heads: int = 0
    add: float = 0.0


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer of the Llama kind. Sizes in elements.

    Norm order: pre_norm normalizes a block's input, post_norm its output before the residual add; both: sandwich.
    norm_offset: what is added to norm weights (1.0 for Gemma). qk_norm: "none", "head" or "whole".
    *_scale multiply: embeddings, block outputs before the residual add, q.k, logits. *_softcap: 0 is off.
    """

    architecture: str
    family: str
    vocab_size: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    norm_eps: float
    act: str                      # "silu" or "gelu_tanh"
    tied: bool
    n_positions: int              # trained length
    dtype: str                    # "bfloat16", "float16" or "float32": what the cache's 16-bit format follows
    attn_scale: float
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: str = "none"
    norm_offset: float = 0.0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attn_softcap: float = 0.0
    logit_softcap: float = 0.0
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None


# Canonical tensor names, which a family maps to the file's names:
#   embed [vocab][hidden]  head [vocab][hidden] (absent when tied)  norm [hidden]
#   layers.{i}.attn_norm  attn_post_norm  mlp_norm  mlp_post_norm   [hidden]
#   layers.{i}.q [heads*head_dim][hidden]  k, v [kv_heads*head_dim][hidden]  o [hidden][heads*head_dim]
#   layers.{i}.q_bias  k_bias  v_bias  o_bias
#   layers.{i}.q_norm  k_norm   [head_dim] or [heads*head_dim], [kv_heads*head_dim]
#   layers.{i}.gate, up [ffn][hidden]  down [hidden][ffn]  gate_bias  up_bias  down_bias

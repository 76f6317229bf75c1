"""What a family file says: names and flags, no graph. Every module of kvrun.models.families lists its FAMILIES."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from functools import cache

LLAMA_NAMES = {
    "embed": "model.embed_tokens", "head": "lm_head", "norm": "model.norm",
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}
"""Canonical name -> module name in a Hugging Face folder; those of layers follow "model.layers.{i}."."""

SANDWICH_NAMES = LLAMA_NAMES | {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
"""The same for blocks with a norm on their output (Gemma, OLMo)."""

GGUF_NAMES = {
    "embed": "token_embd", "head": "output", "norm": "output_norm",
    "attn_norm": "attn_norm", "attn_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm", "mlp_post_norm": "post_ffw_norm",
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}
"""Canonical name -> tensor name in a GGUF file, as llama.cpp writes it; those of layers follow "blk.{i}."."""


@dataclass(frozen=True)
class Family:
    """One architecture family. A str where a number or a bool could stand names the config key that holds it.

    defaults: what transformers' config class assumes for keys that real checkpoints leave out.
    windows: which layers slide when the config has no `layer_types`. "full": none. "all": every one, if
    sliding_window is set. "pattern": all but each sliding_window_pattern-th. "upper": those from max_window_layers
    on, if use_sliding_window. "nope": those without RoPE, if use_sliding_window.
    embed_scale, logit_scale: "key" multiplies; "/key" divides; "sqrt_hidden" is sqrt(hidden_size).
    attn_scale: "" is head_dim**-0.5; "key" is the value itself; "key**-0.5" its power.
    local_theta: "" when all layers rotate alike; else sliding layers are not scaled and take theta from this key.
    partial: may rotate only part of a head (partial_rotary_factor). nope: has layers without RoPE.
    fused, gguf_fused: "qkv" and "gate_up" -> the one tensor that holds those rows one after the other.
    gguf: `general.architecture` names. gguf_permuted: q and k rows are stored in interleaved order.
    gguf_norm_add: what to add to norm weights read from GGUF.
    own_code: the makers' checkpoints still name code of their own in auto_map, for transformers from before it knew the
    family; kvrun computes the same without it. Elsewhere auto_map is refused: what its code changes cannot be known.
    nested: the key of the language model's part of the config of a model with more parts; layer_prefix likewise.
    """

    name: str
    architectures: tuple[str, ...]
    defaults: dict[str, object] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    layer_prefix: str = "model.layers.{i}."
    fused: dict[str, str] = field(default_factory=dict)
    nested: str = ""

    pre_norm: bool = True
    post_norm: bool = False
    norm_offset: float = 0.0
    qk_norm: str = "none"
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    act_key: str = "hidden_act"
    embed_scale: str = ""
    residual_scale: str = ""
    logit_scale: str = ""
    attn_scale: str = ""
    attn_softcap: str = ""
    logit_softcap: str = ""

    windows: str = "full"
    local_theta: str = ""
    partial: bool = False
    interleaved: bool = False
    nope: bool = False
    rope_aliases: dict[str, str] = field(default_factory=dict)
    own_code: bool = False

    gguf: tuple[str, ...] = ()
    gguf_fused: dict[str, str] = field(default_factory=dict)
    gguf_permuted: bool = False
    gguf_norm_add: float = 0.0


@cache
def families() -> dict[str, Family]:
    """Architecture name (as in config.json) -> its family, from every module of kvrun.models.families."""
    package = importlib.import_module("kvrun.models.families")
    known: dict[str, Family] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        for family in importlib.import_module(f"kvrun.models.families.{module}").FAMILIES:
            for architecture in family.architectures:
                if architecture in known:
                    raise ValueError(f"{architecture} belongs to two families")
                known[architecture] = family
    return known

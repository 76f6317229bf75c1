"""Gemma 3, text: per-head q/k norms, five sliding layers to a full one, a theta of their own for the sliding ones."""

from dataclasses import replace

from kvrun.models.family import SANDWICH_NAMES, Family

TEXT = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    defaults={"head_dim": 256, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "tie_word_embeddings": True,
              "attention_bias": False, "sliding_window_pattern": 6},
    names=SANDWICH_NAMES,
    post_norm=True, norm_offset=1.0, qk_norm="head",
    qkv_bias="attention_bias", o_bias="attention_bias",
    act_key="hidden_activation", embed_scale="sqrt_hidden", attn_scale="query_pre_attn_scalar**-0.5",
    attn_softcap="attn_logit_softcapping", logit_softcap="final_logit_softcapping",
    windows="pattern", local_theta="rope_local_base_freq",
    gguf=("gemma3",), gguf_norm_add=-1.0,
)

# The text half of the models that also see: their text_config holds only what differs from the config class.
MULTIMODAL = replace(
    TEXT,
    architectures=("Gemma3ForConditionalGeneration",),
    nested="text_config",
    defaults=TEXT.defaults | {
        "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131072, "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    names={k: f"language_model.{v}" if k in ("embed", "head", "norm") else v for k, v in SANDWICH_NAMES.items()},
    layer_prefix="language_model.model.layers.{i}.",
    gguf=(),
)

FAMILIES = (TEXT, MULTIMODAL)

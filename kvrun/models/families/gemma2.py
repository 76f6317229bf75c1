"""Gemma 2: sandwich norms, soft caps, every second layer slides."""

from kvrun.models.family import SANDWICH_NAMES, Family

FAMILIES = (
    Family(
        name="gemma2",
        architectures=("Gemma2ForCausalLM",),
        defaults={"head_dim": 256, "rope_theta": 10000.0, "tie_word_embeddings": True, "attention_bias": False,
                  "sliding_window_pattern": 2},
        names=SANDWICH_NAMES,
        post_norm=True, norm_offset=1.0,
        qkv_bias="attention_bias", o_bias="attention_bias",
        act_key="hidden_activation", embed_scale="sqrt_hidden", attn_scale="query_pre_attn_scalar**-0.5",
        attn_softcap="attn_logit_softcapping", logit_softcap="final_logit_softcapping",
        windows="pattern",
        gguf=("gemma2",), gguf_norm_add=-1.0,
    ),
)

"""Granite 3 and 4 dense: Llama with four multipliers."""

from kvrun.models.family import Family

FAMILIES = (
    Family(
        name="granite",
        architectures=("GraniteForCausalLM",),
        defaults={"rope_theta": 10000.0, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
        qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias",
        embed_scale="embedding_multiplier", residual_scale="residual_multiplier", logit_scale="/logits_scaling",
        attn_scale="attention_multiplier",
        gguf=("granite",), gguf_permuted=True,
    ),
)

"""Phi-3, 3.5 and 4: q, k, v and gate, up in one tensor each; LongRoPE, which their configs also call su or yarn."""

from kvrun.models.family import Family

FAMILIES = (
    Family(
        name="phi3",
        architectures=("Phi3ForCausalLM",),
        defaults={"rope_theta": 10000.0, "tie_word_embeddings": False},
        fused={"qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"},
        windows="all", partial=True, rope_aliases={"su": "longrope", "yarn": "longrope"},
        own_code=True,
        gguf=("phi3",), gguf_fused={"qkv": "attn_qkv", "gate_up": "ffn_up"},
    ),
)

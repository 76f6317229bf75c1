"""GLM-4 (2024, without sandwich norms, and 0414, with them): neighbouring channels of half a head are rotated."""

from dataclasses import replace

from kvrun.models.family import LLAMA_NAMES, Family

GLM = Family(
    name="glm",
    architectures=("GlmForCausalLM",),
    defaults={"head_dim": 128, "rope_theta": 10000.0, "tie_word_embeddings": False, "attention_bias": True,
              "partial_rotary_factor": 0.5},
    fused={"gate_up": "mlp.gate_up_proj"},
    qkv_bias="attention_bias",
    partial=True, interleaved=True,
    gguf=("chatglm",), gguf_fused={"gate_up": "ffn_up"},
)

GLM4 = replace(
    GLM,
    name="glm4",
    architectures=("Glm4ForCausalLM",),
    names=LLAMA_NAMES | {"attn_post_norm": "post_self_attn_layernorm", "mlp_post_norm": "post_mlp_layernorm"},
    post_norm=True,
    gguf=("glm4",),
)

FAMILIES = (GLM, GLM4)

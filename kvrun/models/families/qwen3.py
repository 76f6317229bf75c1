"""Qwen 3, dense."""

from kvrun.models.family import Family

FAMILIES = (
    Family(
        name="qwen3",
        architectures=("Qwen3ForCausalLM",),
        defaults={"head_dim": 128, "rope_theta": 10000.0, "tie_word_embeddings": False, "attention_bias": False,
                  "use_sliding_window": False},
        qk_norm="head", qkv_bias="attention_bias", o_bias="attention_bias",
        windows="upper",
        gguf=("qwen3",),
    ),
)

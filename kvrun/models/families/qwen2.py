"""Qwen 1.5, 2 and 2.5."""

from kvrun.models.family import Family

FAMILIES = (
    Family(
        name="qwen2",
        architectures=("Qwen2ForCausalLM",),
        defaults={"rope_theta": 10000.0, "tie_word_embeddings": False, "use_sliding_window": False},
        qkv_bias=True,
        windows="upper",
        gguf=("qwen2",),
    ),
)

"""Llama 1-3, SmolLM 1-2, TinyLlama and all that took their shape."""

from kvrun.models.family import Family

FAMILIES = (
    Family(
        name="llama",
        architectures=("LlamaForCausalLM",),
        # Configs of 2023 lack the later ones of these keys.
        defaults={"rope_theta": 10000.0, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
        qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias",
        gguf=("llama",), gguf_permuted=True,
    ),
)

"""SmolLM3: Llama without RoPE on every fourth layer."""

from kvrun.models.family import Family

FAMILIES = (
    Family(
        name="smollm3",
        architectures=("SmolLM3ForCausalLM",),
        defaults={"rope_theta": 2000000.0, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
                  "use_sliding_window": False, "no_rope_layer_interval": 4},
        qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias",
        windows="nope", nope=True,
        gguf=("smollm3",), gguf_permuted=True,
    ),
)

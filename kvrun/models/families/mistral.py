"""Mistral 7B, Nemo and Small 1-2. Version 0.1 slides in every layer; later ones set sliding_window to null."""

from kvrun.models.family import Family

FAMILIES = (
    Family(
        name="mistral",
        architectures=("MistralForCausalLM",),
        defaults={"rope_theta": 10000.0, "tie_word_embeddings": False},
        windows="all",
        gguf=("llama",), gguf_permuted=True,
    ),
)

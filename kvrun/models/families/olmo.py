"""OLMo 2 and 3: norms after the blocks only, q/k norm over the whole projection; OLMo 3 slides in three of four."""

from dataclasses import replace

from kvrun.models.family import SANDWICH_NAMES, Family

OLMO2 = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    defaults={"rope_theta": 10000.0, "tie_word_embeddings": False, "attention_bias": False},
    names=SANDWICH_NAMES,
    pre_norm=False, post_norm=True, qk_norm="whole",
    qkv_bias="attention_bias", o_bias="attention_bias",
    gguf=("olmo2",),
)

OLMO3 = replace(
    OLMO2,
    name="olmo3",
    architectures=("Olmo3ForCausalLM",),
    defaults=OLMO2.defaults | {"rope_theta": 500000.0, "sliding_window_pattern": 4},
    windows="pattern", local_theta="rope_theta",
)

FAMILIES = (OLMO2, OLMO3)

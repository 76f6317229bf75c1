"""A transformers 5 config in the words of the Hub's checkpoints of 2023 to 2025."""

import copy


def old_spelling(config: dict) -> dict:
    """rope_theta beside rope_scaling, rope_local_base_freq, torch_dtype; layer kinds left to the family's rule where
    they follow it."""
    old = copy.deepcopy(config)
    old["torch_dtype"] = old.pop("dtype")
    rope = old.pop("rope_parameters")
    local = None
    if "full_attention" in rope:
        local, rope = rope["sliding_attention"], rope["full_attention"]
    old["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if local and old["model_type"] == "gemma3_text":
        old["rope_local_base_freq"] = local["rope_theta"]
    if rope["rope_type"] == "default":
        old["rope_scaling"] = None
    else:
        rope["type"] = "su" if rope["rope_type"] == "longrope" else rope["rope_type"]
        del rope["rope_type"]
        if old["model_type"] == "phi3":
            old["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
        old["rope_scaling"] = rope
    types = old.get("layer_types")
    if types:
        del old["layer_types"]
        if old["model_type"] == "gemma3_text":
            del old["_sliding_window_pattern"]
            every = types.index("full_attention") + 1
            old["sliding_window_pattern"] = every
    return old

"""Inverse frequencies and attention factors against transformers' ROPE_INIT_FUNCTIONS, over random settings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrun.models import load_spec

HEADS = 2


def config(head_dim: int, positions: int, params: dict) -> dict:
    return dict(architectures=["Phi3ForCausalLM"], model_type="phi3", hidden_size=HEADS * head_dim, intermediate_size=32,
                num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=HEADS, hidden_act="silu",
                max_position_embeddings=positions, rms_norm_eps=1e-5, vocab_size=32, sliding_window=None,
                rope_parameters=params)


def ours(family: str, raw: dict, n_ctx: int | None = None):
    arch = {"llama": "LlamaForCausalLM", "phi3": "Phi3ForCausalLM"}[family]
    return load_spec(raw | dict(architectures=[arch]), "config.json", n_ctx=n_ctx).ropes[0]


def theirs(family: str, raw: dict, seq_len: int | None = None):
    from transformers import LlamaConfig, Phi3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    import copy
    fields = {k: v for k, v in copy.deepcopy(raw).items() if k not in ("architectures", "model_type")}
    made = {"llama": LlamaConfig, "phi3": Phi3Config}[family](**fields)
    kind = made.rope_parameters["rope_type"]
    if kind == "default":
        from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

        return Phi3RotaryEmbedding.compute_default_rope_parameters(made)
    return ROPE_INIT_FUNCTIONS[kind](made, torch.device("cpu"), seq_len=seq_len)


def check(rope, expected, theta: float = 10000.0) -> None:
    """Theirs is float32: a blend of scaled and plain frequencies loses some digits of the plain one where it cancels."""
    inv_freq, attention = expected
    assert len(rope.inv_freq) == len(inv_freq)
    for i, (got, want) in enumerate(zip(rope.inv_freq, inv_freq.tolist())):
        plain = theta ** (-2 * i / rope.dim)
        assert got == pytest.approx(want, rel=3e-6, abs=3e-5 * plain), i
    assert rope.attention_factor == pytest.approx(float(attention), rel=1e-6)


head_dims = st.sampled_from([32, 64, 96, 128, 256])
thetas = st.sampled_from([10000.0, 100000.0, 500000.0, 1e6, 2e6, 12345.0])
factors = st.floats(1.0, 64.0)


@settings(max_examples=150)
@given(st.data(), head_dims, thetas, factors, st.sampled_from([2048, 8192, 32768]))
def test_equals_transformers(data, head_dim, theta, factor, original):
    kind = data.draw(st.sampled_from(["linear", "llama3", "yarn"]))
    params = dict(rope_type=kind, rope_theta=theta, factor=factor)
    if kind != "linear":
        params["original_max_position_embeddings"] = original
    if kind == "llama3":
        params |= dict(low_freq_factor=data.draw(st.floats(0.5, 2)), high_freq_factor=data.draw(st.floats(2.5, 8)))
    if kind == "yarn":
        extra = dict(attention_factor=st.floats(0.5, 2), beta_fast=st.floats(8, 64), beta_slow=st.floats(0.5, 4),
                     mscale=st.floats(0.1, 2), mscale_all_dim=st.floats(0.1, 2), truncate=st.booleans())
        for key, values in extra.items():
            if data.draw(st.booleans()):
                params[key] = data.draw(values)
    raw = config(head_dim, 65536, params)
    check(ours("llama", raw), theirs("llama", raw), theta)


@settings(max_examples=60)
@given(st.data(), st.sampled_from([64, 96, 128]), st.sampled_from([1.0, 0.75, 0.5]), st.booleans())
def test_longrope_and_partial_equal_transformers(data, head_dim, partial, long):
    half = int(head_dim * partial) // 2
    scales = st.lists(st.floats(1, 60), min_size=half, max_size=half)
    params = dict(rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=partial,
                  short_factor=data.draw(scales), long_factor=data.draw(scales))
    if data.draw(st.booleans()):
        params["attention_factor"] = 1.19
    if data.draw(st.booleans()):
        params["factor"] = 32.0
    raw = config(head_dim, 131072, params) | dict(original_max_position_embeddings=4096)
    n = 4097 if long else 4096
    check(ours("phi3", raw, n), theirs("phi3", raw, n))


@pytest.mark.parametrize("partial", [1.0, 0.5, 0.25])
def test_default_and_partial_equal_transformers(partial):
    raw = config(128, 4096, dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=partial))
    check(ours("phi3", raw), theirs("phi3", raw))

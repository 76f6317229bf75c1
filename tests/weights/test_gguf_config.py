"""GGUF metadata as llama.cpp's converters write it -> the spec that the model's own config.json gives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrun.errors import ModelError
from kvrun.models import load_spec
from kvrun.weights.gguf_config import hf_config, hf_generation_config
from kvrun.weights.gguf_file import GgufFile

N_LAYERS = 8
COMMON = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 80, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
          "rope_theta": 20000.0, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "head_dim": 16,
          "tie_word_embeddings": True, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2}
META = {"block_count": N_LAYERS, "embedding_length": 64, "feed_forward_length": 96, "attention.head_count": 4,
        "attention.head_count_kv": 2, "context_length": 256, "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 20000.0, "rope.dimension_count": 16, "vocab_size": 80}
TOKENS = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
SLIDING, FULL = "sliding_attention", "full_attention"
FACTORS = np.linspace(1, 8, 8).astype(np.float32)
LONG = [float(f) for f in FACTORS]

# name -> (GGUF architecture, its own metadata, further tensors, config.json's own keys; None removes a common key)
CASES = {
    "llama": ("llama", {}, {}, {"architectures": ["LlamaForCausalLM"]}),
    "llama untied": ("llama", {}, {"output.weight": np.ones((80, 64), np.float32)},
                     {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}),
    "llama linear": ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {},
                     {"architectures": ["LlamaForCausalLM"], "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "mistral": ("llama", {}, {}, {"architectures": ["MistralForCausalLM"], "sliding_window": None}),
    "mistral3": ("mistral3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_beta_fast": 16.0,
                              "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.original_context_length": 64}, {},
                 {"architectures": ["MistralForCausalLM"], "sliding_window": None, "rope_scaling": {
                     "rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0,
                     "original_max_position_embeddings": 64}}),
    "qwen2": ("qwen2", {}, {}, {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}),
    "qwen2 yarn": ("qwen2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                             "rope.scaling.original_context_length": 64}, {},
                   {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "rope_scaling": {
                       "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
    "qwen3": ("qwen3", {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32}, {},
              {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32, "use_sliding_window": False}),
    "gemma2": ("gemma2", {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32,
                          "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 48,
                          "rope.freq_base": 10000.0}, {},
               {"architectures": ["Gemma2ForCausalLM"], "head_dim": 32, "hidden_activation": "gelu_pytorch_tanh",
                "query_pre_attn_scalar": 32, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
                "sliding_window": 48, "rope_theta": 10000.0, "layer_types": [SLIDING, FULL] * 4}),
    "gemma3": ("gemma3", {"attention.key_length": 32, "attention.value_length": 32, "rope.freq_base": 1e6,
                          "attention.sliding_window": 48, "rope.dimension_count": None}, {},
               {"architectures": ["Gemma3ForCausalLM"], "head_dim": 32, "hidden_activation": "gelu_pytorch_tanh",
                "query_pre_attn_scalar": 32, "attn_logit_softcapping": None, "final_logit_softcapping": None,
                "sliding_window": 48, "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
                "layer_types": [SLIDING] * 5 + [FULL] + [SLIDING] * 2}),
    "phi3": ("phi3", {"attention.sliding_window": 40, "rope.scaling.original_context_length": 256}, {},
             {"architectures": ["Phi3ForCausalLM"], "sliding_window": 40, "original_max_position_embeddings": 256}),
    "phi4 longrope": ("phi3", {"attention.sliding_window": 0, "rope.scaling.original_context_length": 64,
                               "rope.scaling.attn_factor": 1.19, "rope.dimension_count": 12},
                      {"rope_factors_long.weight": FACTORS[:6], "rope_factors_short.weight": FACTORS[:6] / 8},
                      {"architectures": ["Phi3ForCausalLM"], "sliding_window": None, "partial_rotary_factor": 0.75,
                       "original_max_position_embeddings": 64, "rope_scaling": {
                           "rope_type": "longrope", "long_factor": LONG[:6], "short_factor": [f / 8 for f in LONG[:6]],
                           "attention_factor": 1.19, "original_max_position_embeddings": 64, "factor": 4.0}}),
    "olmo2": ("olmo2", {}, {}, {"architectures": ["Olmo2ForCausalLM"]}),
    "olmo3": ("olmo2", {"attention.sliding_window": 48, "attention.sliding_window_pattern": [True, True, True, False] * 2}, {},
              {"architectures": ["Olmo3ForCausalLM"], "sliding_window": 48, "layer_types": ([SLIDING] * 3 + [FULL]) * 2}),
    "granite": ("granite", {"embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0, "attention.scale": 0.0156}, {},
                {"architectures": ["GraniteForCausalLM"], "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
                 "logits_scaling": 8.0, "attention_multiplier": 0.0156}),
    "glm4": ("glm4", {"rope.dimension_count": 8}, {"blk.0.attn_q.bias": np.ones(64, np.float32)},
             {"architectures": ["Glm4ForCausalLM"], "partial_rotary_factor": 0.5, "attention_bias": True}),
    "smollm3": ("smollm3", {}, {}, {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 1, 1, 0] * 2,
                                    "no_rope_layer_interval": 4, "use_sliding_window": False}),
}


def write_model(write_gguf, arch: str, meta: dict, tensors: dict):
    """A GGUF with a header like a real one's, and only the tensors that the config is read from."""
    values = {f"{arch}.{k}": v for k, v in (META | meta).items() if v is not None}
    base = {"token_embd.weight": np.ones((80, 64), np.float32)}
    base |= {f"blk.{i}.ffn_down.weight": np.ones((64, 96), np.float32) for i in range(N_LAYERS)}
    return GgufFile(write_gguf(values | TOKENS, base | tensors, arch))


def close(a, b) -> bool:
    """Equal, with floats as near as the file's 32 bits have them."""
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(close(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, float):
        return a == pytest.approx(b, rel=1e-6)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(close, a, b))
    return a == b


@pytest.mark.parametrize("case", CASES)
def test_the_same_spec_as_from_config_json(case, write_gguf):
    arch, meta, tensors, own = CASES[case]
    file = write_model(write_gguf, arch, meta, tensors)
    ours, theirs = load_spec(hf_config(file), "gguf"), load_spec(COMMON | own, "json")
    if case == "mistral":  # llama.cpp has one architecture for both
        theirs = dataclasses.replace(theirs, architecture=ours.architecture, family=ours.family)
    for f in dataclasses.fields(theirs):
        assert close(getattr(ours, f.name), getattr(theirs, f.name)), f.name


def test_llama3_scaling_is_in_a_tensor(write_gguf):
    """What llama.cpp stores of Llama 3's scaling are the divisors that it works out from the config."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 128}
    plain = load_spec(COMMON | {"architectures": ["LlamaForCausalLM"]}, "json")
    scaled = load_spec(COMMON | {"architectures": ["LlamaForCausalLM"], "rope_scaling": scaling}, "json")
    divisors = np.array(plain.ropes[0].inv_freq) / np.array(scaled.ropes[0].inv_freq)
    assert divisors.max() == pytest.approx(8) and divisors.min() == pytest.approx(1)
    file = write_model(write_gguf, "llama", {}, {"rope_freqs.weight": divisors.astype(np.float32)})
    assert close(load_spec(hf_config(file), "gguf").ropes, scaled.ropes)


def test_real_files(smollm2, gemma3):
    small, gemma = (load_spec(f.config, str(f.path)) for f in (smollm2, gemma3))
    assert (small.hidden, small.ffn, small.heads, small.kv_heads, small.head_dim) == (576, 1536, 9, 3, 64)
    assert len(small.layers) == 30 and small.vocab_size == 49152 and small.n_positions == 8192 and small.tied
    assert (gemma.hidden, gemma.ffn, gemma.heads, gemma.kv_heads, gemma.head_dim) == (640, 2048, 4, 1, 256)
    assert [layer.window for layer in gemma.layers] == ([512] * 5 + [0]) * 3 and gemma.vocab_size == 262144
    thetas = {gemma.layers[i].window: gemma.ropes[gemma.layers[i].rope].inv_freq[1] for i in (0, 5)}
    assert thetas == pytest.approx({512: 1e4 ** (-1 / 128), 0: 1e6 ** (-1 / 128)})
    assert smollm2.generation_config["eos_token_id"] == 2 and gemma3.generation_config["eos_token_id"] == 1
    assert smollm2.n_ctx == 8192 and smollm2.sampling["temperature"] == 0.2


def test_generation_config(write_gguf):
    path = write_gguf({"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2,
                       "tokenizer.ggml.bos_token_id": 1, "general.sampling.temp": 0.5, "general.sampling.top_k": 20},
                      {"a": np.ones(2, np.float32)})
    assert hf_generation_config(GgufFile(path)) == {"bos_token_id": 1, "eos_token_id": [2, 7], "temperature": 0.5, "top_k": 20}


@pytest.mark.parametrize(("arch", "meta", "says"), [
    ("bert", {}, "architecture 'bert'"),
    ("llama", {"block_count": None}, "llama.block_count is missing"),
    ("llama", {"block_count": "two"}, "llama.block_count is 'two'"),
    ("llama", {"block_count": 5000}, "5000 layers but only"),
    ("llama", {"attention.head_count": 0}, "attention.head_count is 0"),
    ("llama", {"attention.head_count_kv": [2] * 7 + [1]}, "differs from layer to layer"),
    ("llama", {"expert_count": 8}, "mixture of experts"),
    ("llama", {"rope.scaling.type": "magic"}, "'magic'"),
    ("llama", {"attention.value_length": 8}, "K and V heads"),
    ("mistral3", {"attention.temperature_scale": 0.1}, "temperature"),
    ("gemma3", {}, "attention.sliding_window is missing"),
    ("gemma3", {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True]}, "window pattern of 1"),
])
def test_refusals(arch, meta, says, write_gguf):
    with pytest.raises(ModelError, match=says.replace("(", r"\(")):
        hf_config(write_model(write_gguf, arch, meta, {}))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_hostile_values_are_model_errors(data, write_gguf):
    """Whatever a header says: a config, which load_spec may still refuse, or a ModelError; in no time and memory."""
    arch, meta, tensors, _ = CASES[data.draw(st.sampled_from(sorted(CASES)))]
    values = META | meta
    hostile = st.sampled_from([0, 1, 3, 2**32 - 1, 0.0, -1.0, float("nan"), float("inf"), "x", True, [0] * N_LAYERS, ["x"], None])
    for key in data.draw(st.lists(st.sampled_from([*values, "rope.scaling.type", "rope.scaling.factor", "expert_count"]), max_size=3)):
        values[key] = data.draw(hostile)
    try:
        load_spec(hf_config(write_model(write_gguf, arch, values, tensors)), "gguf")
    except ModelError as e:
        assert "\n" not in str(e)


def test_equal_per_layer_counts_are_one(write_gguf):
    file = write_model(write_gguf, "llama", {"attention.head_count_kv": [2] * N_LAYERS, "feed_forward_length": [96] * N_LAYERS}, {})
    assert hf_config(file)["num_key_value_heads"] == 2 and hf_config(file)["intermediate_size"] == 96

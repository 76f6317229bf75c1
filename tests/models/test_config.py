"""A config.json is somebody else's file: it gives a ModelSpec or a ModelError that names key and file, nothing else."""

import copy
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrun.errors import ModelError
from kvrun.models import build_plan, load_spec, tensor_refs
from kvrun.models.family import families

# As on the Hub, in the spelling of its time, with what has no meaning here left out.
SMOLLM2 = dict(
    architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=1, eos_token_id=2,
    hidden_act="silu", hidden_size=576, initializer_range=0.041666666666666664, intermediate_size=1536,
    is_llama_config=True, max_position_embeddings=8192, mlp_bias=False, model_type="llama", num_attention_heads=9,
    num_hidden_layers=30, num_key_value_heads=3, pad_token_id=2, pretraining_tp=1, rms_norm_eps=1e-05,
    rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True, torch_dtype="bfloat16",
    transformers_version="4.42.3", use_cache=True, vocab_size=49152)
GEMMA3_1B = dict(
    architectures=["Gemma3ForCausalLM"], attention_bias=False, attn_logit_softcapping=None, bos_token_id=2,
    eos_token_id=[1, 106], final_logit_softcapping=None, head_dim=256, hidden_activation="gelu_pytorch_tanh",
    hidden_size=1152, intermediate_size=6912, max_position_embeddings=32768, model_type="gemma3_text",
    num_attention_heads=4, num_hidden_layers=26, num_key_value_heads=1, query_pre_attn_scalar=256, rms_norm_eps=1e-06,
    rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000, sliding_window=512, sliding_window_pattern=6,
    torch_dtype="bfloat16", vocab_size=262144)
GEMMA3_4B = dict(
    architectures=["Gemma3ForConditionalGeneration"], boi_token_index=255999, eos_token_id=[1, 106],
    model_type="gemma3", torch_dtype="bfloat16", vision_config=dict(hidden_size=1152),
    text_config=dict(hidden_size=2560, intermediate_size=10240, model_type="gemma3_text", num_hidden_layers=34,
                     rope_scaling=dict(factor=8.0, rope_type="linear"), sliding_window=1024))
QWEN25 = dict(
    architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643, eos_token_id=151645,
    hidden_act="silu", hidden_size=896, intermediate_size=4864, max_position_embeddings=32768, max_window_layers=21,
    model_type="qwen2", num_attention_heads=14, num_hidden_layers=24, num_key_value_heads=2, rms_norm_eps=1e-06,
    rope_theta=1000000.0, sliding_window=32768, tie_word_embeddings=True, torch_dtype="bfloat16",
    use_sliding_window=False, vocab_size=151936)
LLAMA31 = SMOLLM2 | dict(
    hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, rope_theta=500000.0,
    max_position_embeddings=131072, tie_word_embeddings=False,
    rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192,
                      rope_type="llama3"))
LLAMA2_2023 = {k: v for k, v in SMOLLM2.items() if k not in ("rope_theta", "attention_bias", "mlp_bias",
                                                             "num_key_value_heads", "rope_scaling")}
PHI4_MINI = dict(
    architectures=["Phi3ForCausalLM"], attention_bias=False, bos_token_id=199999, eos_token_id=199999,
    hidden_act="silu", hidden_size=3072, intermediate_size=8192, max_position_embeddings=131072, model_type="phi3",
    num_attention_heads=24, num_hidden_layers=32, num_key_value_heads=8, original_max_position_embeddings=4096,
    partial_rotary_factor=0.75, rms_norm_eps=1e-05, rope_theta=10000.0, sliding_window=262144,
    rope_scaling=dict(type="longrope", long_factor=[1.5] * 48, short_factor=[1.0] * 48), tie_word_embeddings=True,
    torch_dtype="bfloat16", vocab_size=200064)
CONFIGS = dict(smollm2=SMOLLM2, gemma3_1b=GEMMA3_1B, gemma3_4b=GEMMA3_4B, qwen25=QWEN25, llama31=LLAMA31,
               llama2_2023=LLAMA2_2023, phi4_mini=PHI4_MINI)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_the_hub_load(name):
    spec = load_spec(CONFIGS[name], "config.json")
    plan = build_plan(spec, max_rows=8)
    refs = tensor_refs(spec, CONFIGS[name], "folder")
    parts = {p for w in (*plan.weights, *plan.vectors) for p in w.parts}
    assert parts == set(refs)


def test_what_the_published_models_are():
    assert load_spec(SMOLLM2, "x").ropes[0].inv_freq[:2] == pytest.approx((1.0, 100000 ** (-1 / 32)))
    gemma = load_spec(GEMMA3_1B, "x")
    assert [layer.window for layer in gemma.layers[:7]] == [512] * 5 + [0] + [512]
    assert (gemma.ropes[gemma.layers[0].rope].inv_freq[1] == pytest.approx(10000 ** (-1 / 128))
            and gemma.ropes[gemma.layers[5].rope].inv_freq[1] == pytest.approx(1e6 ** (-1 / 128)))
    assert gemma.tied and gemma.embed_scale == pytest.approx(math.sqrt(1152)) and gemma.eos_token_ids == (1, 106)
    nested = load_spec(GEMMA3_4B, "x")
    assert (nested.heads, nested.kv_heads, nested.vocab_size, nested.dtype) == (8, 4, 262208, "bfloat16")
    assert nested.ropes[nested.layers[5].rope].inv_freq[0] == pytest.approx(1 / 8)
    assert nested.ropes[nested.layers[0].rope].inv_freq[0] == 1.0
    old = load_spec(LLAMA2_2023, "x")
    assert old.kv_heads == old.heads == 9 and old.ropes[0].inv_freq[1] == pytest.approx(10000 ** (-1 / 32))
    phi = load_spec(PHI4_MINI, "x")
    assert phi.ropes[0].dim == 96 and phi.ropes[0].attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert load_spec(PHI4_MINI, "x", n_ctx=4096) == phi
    assert load_spec(PHI4_MINI, "x", n_ctx=4097).ropes[0].inv_freq[0] == pytest.approx(1 / 1.5)


NEEDED = {
    "smollm2": ["architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "max_position_embeddings", "rms_norm_eps", "hidden_act", "vocab_size"],
    "gemma3_1b": ["architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "max_position_embeddings", "rms_norm_eps", "hidden_activation", "vocab_size", "sliding_window",
                  "query_pre_attn_scalar"],
    "phi4_mini": ["sliding_window"],
    "gemma3_4b": ["text_config"],
}


@pytest.mark.parametrize("name,key", [(n, k) for n, keys in NEEDED.items() for k in keys])
def test_a_missing_key_is_named_with_its_file(name, key):
    config = {k: v for k, v in CONFIGS[name].items() if k != key}
    with pytest.raises(ModelError, match=rf"^/models/x/config\.json: {key} is missing$"):
        load_spec(config, "/models/x/config.json")


@pytest.mark.parametrize("change,words", [
    (dict(architectures=["GrokForCausalLM"]), ["'GrokForCausalLM'", "known: ", "LlamaForCausalLM", "Qwen3ForCausalLM"]),
    (dict(architectures=[]), ["architectures"]),
    (dict(architectures="LlamaForCausalLM"), ["architectures", "not a list"]),
    (dict(quantization_config=dict(quant_method="awq", bits=4)), ["quantization_config", "'awq'"]),
    (dict(quantization_config=True), ["quantization_config"]),
    (dict(auto_map=dict(AutoConfig="configuration_phi3.Phi3Config")), ["auto_map", "never runs"]),
    (dict(hidden_size=-576), ["hidden_size", "-576"]),
    (dict(hidden_size=0), ["hidden_size"]),
    (dict(hidden_size=10**400), ["hidden_size"]),
    (dict(hidden_size=576.0), ["hidden_size", "576.0", "not an integer"]),
    (dict(hidden_size="576"), ["hidden_size", "'576'"]),
    (dict(hidden_size=True), ["hidden_size", "True"]),
    (dict(hidden_size=[576]), ["hidden_size", "a list"]),
    (dict(hidden_size=900, head_dim=64), ["hidden_size", "900", "multiple of 32"]),
    (dict(intermediate_size=1500), ["intermediate_size", "multiple of 32"]),
    (dict(head_dim=20), ["num_attention_heads * head_dim", "180", "multiple of 32"]),
    (dict(head_dim=63), ["head_dim", "63", "even"]),
    (dict(num_attention_heads=10**6), ["num_attention_heads"]),
    (dict(num_key_value_heads=2), ["num_attention_heads", "no multiple of num_key_value_heads 2"]),
    (dict(num_key_value_heads=18), ["num_key_value_heads"]),
    (dict(num_hidden_layers=10**9), ["num_hidden_layers"]),
    (dict(vocab_size=2**40), ["vocab_size"]),
    (dict(rms_norm_eps=math.nan), ["rms_norm_eps", "nan"]),
    (dict(rms_norm_eps=math.inf), ["rms_norm_eps", "inf"]),
    (dict(rms_norm_eps="1e-5"), ["rms_norm_eps", "not a number"]),
    (dict(rope_theta=0), ["rope_theta"]),
    (dict(rope_theta=math.nan), ["rope_theta"]),
    (dict(rope_theta=False), ["rope_theta", "False"]),
    (dict(hidden_act="relu2"), ["hidden_act", "'relu2'", "silu"]),
    (dict(tie_word_embeddings="yes"), ["tie_word_embeddings"]),
    (dict(torch_dtype="float8_e4m3fn"), ["torch_dtype", "float8_e4m3fn"]),
    (dict(eos_token_id=["</s>"]), ["eos_token_id", "'</s>'"]),
    (dict(max_position_embeddings=2**70), ["max_position_embeddings"]),
    (dict(rope_scaling="yarn"), ["rope_scaling", "not a JSON object"]),
    (dict(rope_scaling=dict(type="dynamic", factor=2.0)), ["rope_scaling.rope_type", "'dynamic'", "yarn"]),
    (dict(rope_scaling=dict(rope_type="mrope")), ["'mrope'"]),
    (dict(rope_scaling=dict(rope_type="linear")), ["rope_scaling.factor is missing"]),
    (dict(rope_scaling=dict(rope_type="linear", factor=-2)), ["rope_scaling.factor"]),
    (dict(rope_scaling=dict(rope_type="llama3", factor=8, low_freq_factor=4, high_freq_factor=1)), ["high_freq_factor"]),
    (dict(rope_scaling=dict(rope_type="longrope", short_factor=[1.0] * 32, long_factor=[1.0] * 31)), ["31 values", "32"]),
    (dict(rope_scaling=dict(rope_type="longrope", short_factor=[1.0] * 31 + ["x"], long_factor=[1.0] * 32)),
     ["short_factor[31]", "'x'"]),
    (dict(partial_rotary_factor=0.5), ["partial_rotary_factor", "llama"]),
    (dict(layer_types=["full_attention"] * 29), ["layer_types", "30"]),
    (dict(layer_types=["linear_attention"] * 30), ["layer_types"]),
    (dict(layer_types=[{}] * 30), ["layer_types"]),
    (dict(architectures=["\x1b]52;c;AAAA\x07"]), ["\\x1b]52"]),
])
def test_absurd_values_are_refused_by_name(change, words):
    with pytest.raises(ModelError) as caught:
        load_spec(SMOLLM2 | change, "dir/config.json")
    message = str(caught.value)
    assert message.startswith("dir/config.json: ") and caught.value.exit_code == 5
    assert all(w in message for w in words), message
    assert message.isprintable() and len(message) < 700


@pytest.mark.parametrize("config", [None, [], "x", 3, {}, {"architectures": None}])
def test_what_is_no_config_is_refused(config):
    with pytest.raises(ModelError):
        load_spec(config, "config.json")


def test_own_code_is_ignored_where_kvrun_has_its_own():
    """Phi-3 checkpoints still name their code; it is never run, so they load as if they did not. Others are refused."""
    auto_map = dict(auto_map=dict(AutoModelForCausalLM="modeling_phi3.Phi3ForCausalLM"))
    name = next(n for n, c in CONFIGS.items() if c["architectures"] == ["Phi3ForCausalLM"])
    assert load_spec(CONFIGS[name] | auto_map, "x") == load_spec(CONFIGS[name], "x")


def test_bidirectional_and_windowless_configs_are_refused():
    with pytest.raises(ModelError, match="use_bidirectional_attention"):
        load_spec(GEMMA3_1B | dict(use_bidirectional_attention=True), "x")
    with pytest.raises(ModelError, match="sliding_window is null"):
        load_spec(GEMMA3_1B | dict(sliding_window=None), "x")


def test_contradicting_windows_are_refused():
    with pytest.raises(ModelError, match="layer_types has sliding layers, but use_sliding_window is false"):
        load_spec(QWEN25 | dict(layer_types=["sliding_attention"] * 24), "x")
    with pytest.raises(ModelError, match="layer_types mixes kinds"):
        load_spec(SMOLLM2 | dict(layer_types=["sliding_attention"] * 29 + ["full_attention"]), "x")


def test_every_family_names_what_its_config_needs():
    """Each architecture refuses an empty config by its first missing key, not by a KeyError of its own table."""
    for architecture in families():
        with pytest.raises(ModelError, match="is missing"):
            load_spec({"architectures": [architecture]}, "x")


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(0, 300), st.floats(), st.floats(0, 10), st.text(max_size=8),
    st.sampled_from(["yarn", "longrope", "llama3", "linear", "default", "su", "full_attention", "sliding_attention",
                     "silu", 10**400, -1, 2**31, 1e308, 5e-324]))
VALUES = st.recursive(SCALARS, lambda inner: st.one_of(
    st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(
        ["rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
         "attention_factor", "mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor",
         "original_max_position_embeddings", "partial_rotary_factor", "full_attention", "sliding_attention"]),
        inner, max_size=6)), max_leaves=8)
EXTRA = ["rope_parameters", "rope_scaling", "rope_theta", "layer_types", "sliding_window", "use_sliding_window", "head_dim",
         "no_rope_layers", "quantization_config", "auto_map", "partial_rotary_factor", "text_config",
         "original_max_position_embeddings", "sliding_window_pattern", "_sliding_window_pattern", "max_window_layers",
         "no_rope_layer_interval", "embedding_multiplier", "logits_scaling", "attention_multiplier",
         "residual_multiplier", "dtype", "architectures", "query_pre_attn_scalar"]


@settings(max_examples=1500, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_mutated_configs_give_a_spec_or_a_model_error(data):
    config = copy.deepcopy(data.draw(st.sampled_from(list(CONFIGS.values()))))
    config["architectures"] = [data.draw(st.sampled_from(sorted(families())))]
    target = config["text_config"] if "text_config" in config and data.draw(st.booleans()) else config
    for _ in range(data.draw(st.integers(1, 4))):
        key = data.draw(st.sampled_from(sorted(target) + EXTRA))
        if data.draw(st.integers(0, 4)) == 0:
            target.pop(key, None)
        else:
            target[key] = data.draw(VALUES)
    try:
        spec = load_spec(config, "config.json", n_ctx=data.draw(st.sampled_from([None, 100, 10000])))
    except ModelError as error:
        assert str(error).startswith("config.json: ") and str(error).isprintable()
        return
    assert all(math.isfinite(f) for r in spec.ropes for f in (*r.inv_freq, r.attention_factor))
    assert all(type(v) is not bool for v in (spec.hidden, spec.heads, spec.vocab_size))
    assert spec.hidden % 32 == spec.ffn % 32 == spec.heads * spec.head_dim % 32 == 0
    assert json.dumps(spec.attn_scale) not in ("NaN", "Infinity")
    tensor_refs(spec, config, "folder")

"""Every family against transformers, on tiny random models: folder and config exactly as save_pretrained leaves them."""

import numpy as np
import pytest
import transformers as tf

from kvrun.models import load_spec
from kvrun.weights.folder import FolderSource

from .oracle import assert_close, expected_logits, make_tiny, reference_logits
from .spelling import old_spelling

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = dict(vocab_size=211, hidden_size=128, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, head_dim=64, max_position_embeddings=512, bos_token_id=1, eos_token_id=[2, 3],
              pad_token_id=None, tie_word_embeddings=False, rms_norm_eps=0.02)
LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
FACTORS = dict(short_factor=np.linspace(1, 2, 36).tolist(), long_factor=np.linspace(1.5, 9, 36).tolist())


def rope(kind: str, theta: float = 10000.0, **more) -> dict:
    return dict(rope_parameters={"rope_type": kind, "rope_theta": theta, **more})


YARN = dict(factor=4.0, original_max_position_embeddings=64)
CASES = {
    "llama": (tf.LlamaConfig, {}),
    "llama-bias": (tf.LlamaConfig, dict(attention_bias=True, mlp_bias=True)),
    "llama-mha-tied": (tf.LlamaConfig, dict(num_key_value_heads=4, head_dim=32, tie_word_embeddings=True)),
    "llama-mqa-128-llama3": (tf.LlamaConfig, dict(num_key_value_heads=1, head_dim=128, **rope(
        "llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128))),
    "llama-linear": (tf.LlamaConfig, rope("linear", factor=3.0)),
    "llama-yarn": (tf.LlamaConfig, rope("yarn", **YARN)),
    "llama-yarn-full": (tf.LlamaConfig, rope("yarn", **YARN, beta_fast=16.0, beta_slow=2.0, mscale=0.8,
                                              mscale_all_dim=0.5, truncate=False)),
    "mistral-window": (tf.MistralConfig, dict(sliding_window=24)),
    "mistral": (tf.MistralConfig, dict(sliding_window=None, head_dim=96, num_attention_heads=3, num_key_value_heads=3)),
    "qwen2": (tf.Qwen2Config, dict(hidden_size=256, tie_word_embeddings=True)),
    "qwen2-window": (tf.Qwen2Config, dict(hidden_size=256, use_sliding_window=True, sliding_window=40,
                                          max_window_layers=1)),
    "qwen3-mqa-128": (tf.Qwen3Config, dict(num_key_value_heads=1, head_dim=128)),
    "qwen3-bias-yarn": (tf.Qwen3Config, dict(attention_bias=True, **rope("yarn", 1e6, **YARN, attention_factor=1.3))),
    "gemma2-256": (tf.Gemma2Config, dict(num_hidden_layers=4, head_dim=256, sliding_window=32, query_pre_attn_scalar=144,
                                         tie_word_embeddings=True, attn_logit_softcapping=20.0,
                                         final_logit_softcapping=15.0)),
    "gemma2-plain": (tf.Gemma2Config, dict(attn_logit_softcapping=None, final_logit_softcapping=None, sliding_window=32,
                                           attention_bias=True)),
    "gemma3-mqa-256": (tf.Gemma3TextConfig, dict(num_hidden_layers=4, num_key_value_heads=1, head_dim=256,
                                                 sliding_window=33, layer_types=LAYERS, query_pre_attn_scalar=200,
                                                 tie_word_embeddings=True)),
    "gemma3-linear": (tf.Gemma3TextConfig, dict(num_hidden_layers=7, sliding_window=48, rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}})),
    "phi3-96": (tf.Phi3Config, dict(hidden_size=288, num_attention_heads=3, num_key_value_heads=3, sliding_window=64)),
    "phi3-window-over-trained": (tf.Phi3Config, dict(hidden_size=256, sliding_window=4096)),
    "phi3-longrope": (tf.Phi3Config, dict(hidden_size=288, num_attention_heads=3, num_key_value_heads=1,
                                          original_max_position_embeddings=400,
                                          rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0,
                                                           "partial_rotary_factor": 0.75, **FACTORS})),
    "smollm3": (tf.SmolLM3Config, dict(hidden_size=256, num_hidden_layers=4, tie_word_embeddings=True)),
    "smollm3-window": (tf.SmolLM3Config, dict(hidden_size=256, num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0],
                                              use_sliding_window=True, sliding_window=30)),
    "olmo2": (tf.Olmo2Config, dict(hidden_size=256)),
    "olmo2-mha-bias": (tf.Olmo2Config, dict(hidden_size=256, num_key_value_heads=4, attention_bias=True)),
    "olmo3": (tf.Olmo3Config, dict(hidden_size=256, num_hidden_layers=4, sliding_window=50, rope_parameters={
        "full_attention": {"rope_type": "yarn", "rope_theta": 5e5, "attention_factor": 1.2, **YARN},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}})),
    "granite": (tf.GraniteConfig, dict(hidden_size=256, embedding_multiplier=3.0, logits_scaling=8.0,
                                       residual_multiplier=0.7, attention_multiplier=0.3)),
    "glm": (tf.GlmConfig, {}),
    "glm4-128": (tf.Glm4Config, dict(head_dim=128, num_key_value_heads=1)),
    "glm4-no-bias": (tf.Glm4Config, dict(attention_bias=False, **rope("default", partial_rotary_factor=0.25))),
}


def config_of(name: str):
    cls, changes = CASES[name]
    fields = COMMON | changes
    if cls in (tf.Qwen2Config, tf.Phi3Config, tf.SmolLM3Config, tf.Olmo2Config, tf.Olmo3Config, tf.GraniteConfig):
        del fields["head_dim"]                      # always hidden/heads there
    return cls(**fields)


@pytest.fixture(params=CASES)
def tiny(request, tmp_path):
    return make_tiny(config_of(request.param), tmp_path)


def test_logits_equal_transformers(tiny):
    source = FolderSource(tiny.folder)
    ids = tiny.ids(300)
    want = expected_logits(tiny.model, ids)
    for chunk in (300, 64):
        assert_close(reference_logits(tiny.config, source, "folder", ids, chunk), want, f"chunks of {chunk}")
    assert_close(reference_logits(tiny.config, source, "folder", ids[:140], 1), want[:140], "token by token")


def test_old_config_spelling_gives_the_same_spec(tiny):
    old = old_spelling(tiny.config)
    assert "rope_theta" in old and "rope_parameters" not in old and "torch_dtype" in old
    assert load_spec(old, "old") == load_spec(tiny.config, "new")


def test_longrope_uses_long_factors_when_the_context_is_longer_than_the_original(tmp_path):
    tiny = make_tiny(config_of("phi3-longrope"), tmp_path)
    source = FolderSource(tmp_path)
    ids = tiny.ids(450)                             # past original_max_position_embeddings, 400
    want = expected_logits(tiny.model, ids)
    assert_close(reference_logits(tiny.config, source, "folder", ids, 128), want)
    short = reference_logits(tiny.config, source, "folder", ids[:300], 128, n_ctx=400)
    assert np.abs(short - want[:300]).max() > 0.05 * np.abs(want).max()


def test_text_of_a_multimodal_gemma(tmp_path):
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                  patch_size=14, model_type="siglip_vision_model")
    text = config_of("gemma3-mqa-256").to_dict()
    tiny = make_tiny(tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4,
                                     tie_word_embeddings=True, architectures=["Gemma3ForConditionalGeneration"]), tmp_path)
    assert tiny.config["architectures"] == ["Gemma3ForConditionalGeneration"]
    ids = tiny.ids(200)
    got = reference_logits(tiny.config, FolderSource(tmp_path), "folder", ids, 64)
    assert_close(got, expected_logits(tiny.model, ids))

"""GGUF metadata in the terms of a Hugging Face config.json.

Keys on the GGUF side: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and what llama.cpp's converters write;
on the other side the names of the model's own config.json, so that one reader serves both kinds of file. What
llama.cpp keeps in its code and not in the file (Gemma's window pattern and local theta, SmolLM3's layers without RoPE)
is added here, from the published configs.
"""

from __future__ import annotations

import struct

from kvrun.errors import ModelError, show
from kvrun.weights.blob import read_bytes
from kvrun.weights.gguf_file import GgufArray, GgufFile

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral3": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM", "olmo2": "Olmo2ForCausalLM", "granite": "GraniteForCausalLM",
    "glm4": "Glm4ForCausalLM", "smollm3": "SmolLM3ForCausalLM",
}
_MODEL_TYPES = {"llama": "llama", "mistral3": "mistral", "gemma3": "gemma3_text"}
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
             "penalty_repeat": "repetition_penalty"}


class _Meta:
    """Typed look-ups of `{arch}.KEY`."""

    def __init__(self, file: GgufFile):
        self.file, self.meta = file, file.metadata
        self.arch = self.meta.get("general.architecture")
        if self.arch not in _ARCHITECTURES:
            raise ModelError(f"{file.path}: architecture {show(self.arch)} is not supported "
                             f"(known: {', '.join(sorted(_ARCHITECTURES))})")

    def get(self, key: str, kind: type, default=None):
        """The value, or `default` where the key is absent. A per-layer array counts as one value if all are equal."""
        value = self.meta.get(f"{self.arch}.{key}")
        if value is None:
            return default
        if isinstance(value, GgufArray):
            if len(value) == 0 or any(v != value[0] for v in value):
                raise ModelError(f"{self.file.path}: {self.arch}.{key} differs from layer to layer, "
                                 "which kvrun does not support")
            value = value[0]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.file.fail(f"damaged: {self.arch}.{key} is {show(value)}, not {kind.__name__}")
        return value

    def need(self, key: str, kind: type):
        value = self.get(key, kind)
        if value is None:
            raise self.file.fail(f"metadata key {self.arch}.{key} is missing")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.need(key, int) if default is None else self.get(key, int, default)
        if not 0 < value < 1 << 31:
            raise self.file.fail(f"damaged: {self.arch}.{key} is {value}")
        return value


def hf_config(file: GgufFile) -> dict:
    """The config.json that the model would have on the Hub. ModelError for an unsupported architecture or a bad key."""
    m = _Meta(file)
    if m.get("expert_count", int, 0):
        raise ModelError(f"{file.path}: a mixture of experts ({m.arch}), which kvrun does not support")
    embed = file.tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        raise file.fail("tensor 'token_embd.weight' is missing or misshapen")
    layers, heads, hidden = m.size("block_count"), m.size("attention.head_count"), m.size("embedding_length")
    if layers > len(file.tensors):
        raise file.fail(f"damaged: {layers} layers but only {len(file.tensors)} tensors")
    head_dim = m.size("attention.key_length", max(hidden // heads, 1))
    if m.size("attention.value_length", head_dim) != head_dim:
        raise ModelError(f"{file.path}: K and V heads of different sizes are not supported")
    config = {
        "architectures": [_ARCHITECTURES[m.arch]],
        "model_type": _MODEL_TYPES.get(m.arch, m.arch),
        "vocab_size": embed.shape[0],
        "hidden_size": hidden,
        "intermediate_size": m.size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": m.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": m.size("context_length"),
        "rms_norm_eps": m.need("attention.layer_norm_rms_epsilon", float),
        "rope_theta": m.get("rope.freq_base", float, 10000.0),
        "rope_scaling": _rope_scaling(m),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors or "blk.0.attn_qkv.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        # the 16-bit type of the cache follows this; quantized files are f16 throughout (their scales, llama.cpp's cache)
        "torch_dtype": {"f32": "float32", "bf16": "bfloat16"}.get(_linear_dtype(file), "float16"),
        **_token_ids(file),
    }
    rotated = m.size("rope.dimension_count", head_dim)
    if rotated != head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    if family := _FAMILIES.get(m.arch):
        family(m, config)
    return config


def hf_generation_config(file: GgufFile) -> dict:
    """generation_config.json: every id that ends an answer, and the sampling that the file recommends."""
    ids = _token_ids(file)
    ends = [ids.get("eos_token_id")] + [file.metadata.get(f"tokenizer.ggml.{k}_token_id") for k in ("eot", "eom")]
    ends = list(dict.fromkeys(i for i in ends if type(i) is int))
    out = {k: v for k, v in ids.items() if k != "eos_token_id"}
    if ends:
        out["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    for key, name in _SAMPLING.items():
        if isinstance(value := file.metadata.get(f"general.sampling.{key}"), (int, float)):
            out[name] = value
    return out


def _token_ids(file: GgufFile) -> dict:
    pairs = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding", "unk_token_id": "unknown"}
    found = {hf: file.metadata.get(f"tokenizer.ggml.{g}_token_id") for hf, g in pairs.items()}
    return {k: v for k, v in found.items() if type(v) is int}


def _linear_dtype(file: GgufFile) -> str:
    """What the first layer's big matrices are stored in."""
    for name in ("blk.0.ffn_down.weight", "blk.0.attn_output.weight"):
        if name in file.tensors:
            return file.tensors[name].dtype
    return ""


def _factors(m: _Meta, name: str) -> list[float] | None:
    """A small f32 tensor of RoPE divisors, one per channel pair."""
    t = m.file.tensors.get(name)
    if t is None:
        return None
    if t.dtype != "f32" or t.n_bytes > 1 << 16:
        raise m.file.fail(f"damaged: tensor {show(name)} is {t.dtype} {list(t.shape)}")
    data = read_bytes(m.file.fd, t.n_bytes, t.offset, m.file.path, m.file.repair)
    return list(struct.unpack(f"<{t.n_bytes // 4}f", data))


def _rope_scaling(m: _Meta) -> dict | None:
    trained = m.size("context_length")
    original = m.size("rope.scaling.original_context_length", trained)
    if plain := _factors(m, "rope_freqs.weight"):
        # Llama 3's scaling, already worked out per channel pair: LongRoPE with both lists equal says just that
        return {"rope_type": "longrope", "short_factor": plain, "long_factor": plain, "factor": 1.0,
                "attention_factor": 1.0, "original_max_position_embeddings": trained}
    long, short = _factors(m, "rope_factors_long.weight"), _factors(m, "rope_factors_short.weight")
    attn = m.get("rope.scaling.attn_factor", float)
    if long and short:
        out = {"rope_type": "longrope", "short_factor": short, "long_factor": long, "factor": trained / original,
               "original_max_position_embeddings": original}
        return out | ({"attention_factor": attn} if attn else {})
    kind = m.get("rope.scaling.type", str, "none")
    factor = m.get("rope.scaling.factor", float) or m.get("rope.scale_linear", float) or 1.0
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        out = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for gguf, hf in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if (value := m.get(f"rope.scaling.{gguf}", float)) is not None:
                out[hf] = value
        return out | ({"attention_factor": attn} if attn else {})
    raise ModelError(f"{m.file.path}: RoPE scaling {show(kind)} is not supported")


def _windows(m: _Meta, config: dict, period: int) -> None:
    """sliding_window and layer_types. The file's pattern (an array, or a period) before `period`: every period-th full."""
    config["sliding_window"] = m.size("attention.sliding_window")
    pattern = m.meta.get(f"{m.arch}.attention.sliding_window_pattern")
    n = config["num_hidden_layers"]
    if isinstance(pattern, GgufArray):
        if len(pattern) != n:
            raise m.file.fail(f"damaged: a window pattern of {len(pattern)} for {n} layers")
        slides = [bool(p) for p in pattern]
    else:
        period = pattern if type(pattern) is int and pattern > 0 else period
        slides = [(i + 1) % period != 0 for i in range(n)]
        config["sliding_window_pattern"] = period
    config["layer_types"] = ["sliding_attention" if s else "full_attention" for s in slides]


def _mistral3(m: _Meta, config: dict) -> None:
    if m.get("attention.temperature_scale", float, 0.0):
        raise ModelError(f"{m.file.path}: attention temperature scaling (mistral3) is not supported")
    config["sliding_window"] = m.get("attention.sliding_window", int, 0) or None


def _qwen2(m: _Meta, config: dict) -> None:
    config["use_sliding_window"] = False


def _gemma(m: _Meta, config: dict, big: int) -> None:
    """`big`: the layer count of the one size that scales queries by hidden/heads, not by the head size."""
    del config["hidden_act"]
    config["hidden_activation"] = "gelu_pytorch_tanh"
    wide = config["num_hidden_layers"] == big
    config["query_pre_attn_scalar"] = (
        config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"])
    config["attn_logit_softcapping"] = m.get("attn_logit_softcapping", float)
    config["final_logit_softcapping"] = m.get("final_logit_softcapping", float)


def _gemma2(m: _Meta, config: dict) -> None:
    _gemma(m, config, big=46)
    config["attn_logit_softcapping"] = config["attn_logit_softcapping"] or 50.0
    config["final_logit_softcapping"] = config["final_logit_softcapping"] or 30.0
    _windows(m, config, period=2)


def _gemma3(m: _Meta, config: dict) -> None:
    _gemma(m, config, big=62)
    config["rope_theta"] = m.get("rope.freq_base", float, 1_000_000.0)
    config["rope_local_base_freq"] = m.get("rope.freq_base_swa", float, 10_000.0)
    _windows(m, config, period=6)


def _phi3(m: _Meta, config: dict) -> None:
    config["original_max_position_embeddings"] = m.size(
        "rope.scaling.original_context_length", config["max_position_embeddings"])
    config["sliding_window"] = m.get("attention.sliding_window", int, 0) or None


def _olmo2(m: _Meta, config: dict) -> None:
    if m.get("attention.sliding_window", int, 0):
        config["architectures"], config["model_type"] = ["Olmo3ForCausalLM"], "olmo3"
        _windows(m, config, period=4)


def _granite(m: _Meta, config: dict) -> None:
    config["embedding_multiplier"] = m.get("embedding_scale", float, 1.0)
    config["residual_multiplier"] = m.get("residual_scale", float, 1.0)
    config["logits_scaling"] = m.get("logit_scale", float, 1.0)
    config["attention_multiplier"] = m.get("attention.scale", float) or config["head_dim"] ** -0.5


def _glm4(m: _Meta, config: dict) -> None:
    config.setdefault("partial_rotary_factor", 1.0)


def _smollm3(m: _Meta, config: dict) -> None:
    config["no_rope_layer_interval"] = 4
    config["no_rope_layers"] = [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])]
    config["use_sliding_window"] = False


_FAMILIES = {"mistral3": _mistral3, "qwen2": _qwen2, "qwen3": _qwen2, "gemma2": _gemma2, "gemma3": _gemma3,
             "phi3": _phi3, "olmo2": _olmo2, "granite": _granite, "glm4": _glm4, "smollm3": _smollm3}

"""Names and shapes: GGUF files written as llama.cpp's converters write them, and what is missing or misshapen."""

import math
from dataclasses import dataclass, field

import gguf
import numpy as np
import pytest
import torch

from kvrun.errors import ModelError
from kvrun.models import check_tensors, load_spec, tensor_refs
from kvrun.weights.folder import FolderSource
from kvrun.weights.gguf_config import hf_config
from kvrun.weights.gguf_file import GgufFile
from kvrun.weights.gguf_source import GgufSource

from .oracle import Tiny, assert_close, expected_logits, make_tiny, reference_logits
from .test_families import config_of

pytestmark = pytest.mark.usefixtures("one_thread")

# Case of test_families -> (architecture of the file, whether the converter turns q and k rows, adds 1 to norms).
GGUF = {
    "llama-bias": ("llama", True, 0), "llama-mqa-128-llama3": ("llama", True, 0), "llama-linear": ("llama", True, 0),
    "qwen2": ("qwen2", False, 0), "qwen3-mqa-128": ("qwen3", False, 0), "gemma2-256": ("gemma2", False, 1),
    "gemma3-mqa-256": ("gemma3", False, 1), "phi3-96": ("phi3", False, 0), "phi3-longrope": ("phi3", False, 0),
    "olmo2": ("olmo2", False, 0), "olmo3": ("olmo2", False, 0), "granite": ("granite", True, 0),
    "glm4-128": ("glm4", False, 0), "smollm3": ("smollm3", True, 0),
}


def write_gguf(tiny: Tiny, arch: str, permute: bool, norm_add: float) -> None:
    """The model as a float32 GGUF file, with names from gguf's own table and row order as in convert_hf_to_gguf."""
    config = tiny.config
    writer = gguf.GGUFWriter(tiny.folder / "model.gguf", arch)
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config["rope_parameters"].get("full_attention", config["rope_parameters"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if arch == "gemma3" or config["model_type"] == "olmo3":
        writer.add_sliding_window_pattern([t == "sliding_attention" for t in config["layer_types"]])
    if arch == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    write_rope_scaling(writer, config, rope, head_dim)
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch),
                                     config["num_hidden_layers"])
    for name, value in tiny.model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        data = value.numpy()
        for part, n in (("q_proj", heads), ("k_proj", kv)):
            if permute and part in name:
                data = data.reshape(n, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        if name.endswith("norm.weight"):
            data = data + np.float32(norm_add)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_rope_scaling(writer: gguf.GGUFWriter, config: dict, rope: dict, head_dim: int) -> None:
    """Llama 3's and LongRoPE's divisors become tensors; the rest becomes keys."""
    kind = rope["rope_type"]
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(original)
    if kind == "yarn":
        writer.add_rope_scaling_attn_factors(rope["attention_factor"])
    if kind == "longrope":
        scale = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        for name in ("long", "short"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32))
    if kind == "llama3":
        plain = rope["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
        wavelength, low, high = 2 * np.pi / plain, original / rope["low_freq_factor"], original / rope["high_freq_factor"]
        smooth = (original / wavelength - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        divisors = 1 / ((1 - smooth) / rope["factor"] + smooth)
        divisors = np.where(wavelength < high, 1.0, np.where(wavelength > low, rope["factor"], divisors))
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))


@pytest.mark.parametrize("case", GGUF)
def test_gguf_files_of_every_architecture_give_the_same_logits(case, tmp_path):
    arch, permute, norm_add = GGUF[case]
    config = config_of(case)
    if arch.startswith("gemma"):
        config.query_pre_attn_scalar = config.head_dim      # llama.cpp has no key for it
    tiny = make_tiny(config, tmp_path)
    write_gguf(tiny, arch, permute, norm_add)
    file = GgufFile(tmp_path / "model.gguf")
    source, ids = GgufSource(file), tiny.ids(150)
    got = reference_logits(hf_config(file), source, "gguf", ids, 64)
    assert_close(got, expected_logits(tiny.model, ids))
    source.close()


@pytest.fixture
def llama(tmp_path):
    return make_tiny(config_of("llama-bias"), tmp_path)


@dataclass
class Altered:
    """A source with some tensors gone, reshaped or added."""

    source: FolderSource
    gone: tuple[str, ...] = ()
    shapes: dict = field(default_factory=dict)

    def names(self):
        return [n for n in self.source.names() if n not in self.gone] + [n for n in self.shapes if n not in self.source.names()]

    def info(self, name):
        return ("f32", self.shapes[name]) if name in self.shapes else self.source.info(name)


def check(tiny: Tiny, **change) -> None:
    spec = load_spec(tiny.config, "config.json")
    check_tensors(spec, tensor_refs(spec, tiny.config, "folder"), Altered(FolderSource(tiny.folder), **change), "dir")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
                                  "model.layers.1.self_attn.k_proj.bias", "model.layers.2.mlp.down_proj.weight"])
def test_a_missing_or_misshapen_tensor_is_named(llama, name):
    check(llama)
    with pytest.raises(ModelError, match=f"^dir: tensor '{name}' is missing"):
        check(llama, gone=(name,))
    shape = FolderSource(llama.folder).info(name)[1]
    for wrong in ((*shape[:-1], shape[-1] + 1), (shape[0] - 1, *shape[1:]), (1, *shape)):
        with pytest.raises(ModelError, match=f"^dir: tensor '{name}' has shape .* as the config says"):
            check(llama, shapes={name: wrong})


def test_a_tensor_that_would_go_unused_is_named(llama):
    check(llama, shapes={"model.layers.0.self_attn.rotary_emb.inv_freq": (32,), "vision.layers.0.weight": (3,)})
    with pytest.raises(ModelError, match="'model.layers.0.self_attn.q_norm.weight' has no place"):
        check(llama, shapes={"model.layers.0.self_attn.q_norm.weight": (64,)})


def test_fused_tensors_must_have_all_their_rows(tmp_path):
    tiny = make_tiny(config_of("phi3-96"), tmp_path)
    spec = load_spec(tiny.config, "config.json")
    refs = tensor_refs(spec, tiny.config, "folder")
    assert [(refs[f"layers.1.{p}"].start, refs[f"layers.1.{p}"].stop) for p in "qkv"] == [(0, 288), (288, 576), (576, 864)]
    for rows in (863, 865, 288):
        with pytest.raises(ModelError, match=r"qkv_proj.weight' has shape"):
            check(tiny, shapes={"model.layers.1.self_attn.qkv_proj.weight": (rows, 288)})


def test_a_tied_head_is_no_tensor_of_its_own(tmp_path):
    tiny = make_tiny(config_of("llama-mha-tied"), tmp_path)
    spec = load_spec(tiny.config, "config.json")
    for kind in ("folder", "gguf"):
        assert "head" not in tensor_refs(spec, tiny.config, kind)
    assert torch.equal(tiny.model.lm_head.weight, tiny.model.model.embed_tokens.weight)
    check(tiny, shapes={"lm_head.weight": (211, 128)})       # a copy in the file does no harm

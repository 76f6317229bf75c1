"""Tiny real models in the Hugging Face layout, made where a test runs: config, weights and a byte-level tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BOS, EOS, START = "<s>", "</s>", "<turn>"
TEMPLATE = ("{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<turn>assistant\n{% endif %}")


def byte_alphabet() -> list[str]:
    """Character i stands for byte i in a byte-level vocabulary (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) if b in plain else chr(256 + others.index(b)) for b in range(256)]


def _write(folder: Path, pieces: Sequence[bytes], vocab_tail: Sequence[str], tensors: dict[str, np.ndarray], config: dict,
           template: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = byte_alphabet()
    names = [*alphabet, *("".join(alphabet[b] for b in piece) for piece in pieces)]
    assert len(set(names)) == len(names), "every scripted piece must be another one"
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in vocab_tail])
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS,
                 "add_bos_token": True, "clean_up_tokenization_spaces": False}
    if template is not None:
        described["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
    ids = {name: len(names) + i for i, name in enumerate(vocab_tail)}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(names) + len(vocab_tail),
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0, "max_position_embeddings": 1 << 17,
        "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": ids[BOS], "eos_token_id": ids[EOS],
        "attention_bias": False, "mlp_bias": False} | config
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: np.ascontiguousarray(t, dtype=np.float32) for name, t in tensors.items()}, str(folder / "model.safetensors"))


def _layer(i: int, sizes: dict[str, int], draw) -> dict[str, np.ndarray]:
    hidden, ffn, q, kv = sizes["hidden"], sizes["ffn"], sizes["heads"] * sizes["dim"], sizes["kv_heads"] * sizes["dim"]
    shapes = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
              "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
              "mlp.down_proj": (hidden, ffn)}
    tensors = {f"model.layers.{i}.{name}.weight": draw(shape) for name, shape in shapes.items()}
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.{i}.{name}.weight"] = np.ones(hidden)
    return tensors


def _config(sizes: dict[str, int], layers: int) -> dict:
    return {"hidden_size": sizes["hidden"], "intermediate_size": sizes["ffn"], "num_hidden_layers": layers,
            "num_attention_heads": sizes["heads"], "num_key_value_heads": sizes["kv_heads"], "head_dim": sizes["dim"]}


def random_model(folder: Path, seed: int, *, layers: int = 3, window: int = 0, template: str | None = TEMPLATE,
                 dim: int = 32, key_bias: float | None = None) -> Path:
    """Random weights, spread enough that answers wander over the vocabulary and depend on all of the context.

    With top_k=50 or greedy, an answer has no end of its own. window: 0 is a Llama with full attention, else a Mistral
    whose layers all slide over that many positions. dim: the size of a head. key_bias: a Qwen 2 with that bias on one
    channel of the last layer's K.
    """
    rng = np.random.default_rng(seed)
    sizes = {"hidden": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "dim": dim}

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal(shape) * (2.0 / np.sqrt(shape[-1]))

    vocab = 256 + 3
    head = rng.standard_normal((vocab, sizes["hidden"])) * 0.4
    head[256:] = 0                # special tokens have logit 0: never greedy, never among the likelier half
    tensors = {"model.embed_tokens.weight": rng.standard_normal((vocab, sizes["hidden"])),
               "lm_head.weight": head, "model.norm.weight": np.ones(sizes["hidden"])}
    for i in range(layers):
        tensors |= _layer(i, sizes, draw)
    config = _config(sizes, layers)
    if window:
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    if key_bias is not None:
        config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
        for i in range(layers):
            tensors |= {f"model.layers.{i}.self_attn.{p}_proj.bias": np.zeros(dim * sizes["heads" if p == "q" else "kv_heads"]) for p in "qkv"}
        tensors[f"model.layers.{layers - 1}.self_attn.k_proj.bias"][5] = key_bias
    _write(folder, [], [BOS, EOS, START], tensors, config, template)
    return folder


def scripted_model(folder: Path, script: Sequence[bytes], *, loop: bool = False, template: str | None = TEMPLATE) -> Path:
    """A model that answers anything with `script`, a piece a token, then EOS (or from the start again).

    Its layer adds nothing to the residual stream, so the next token is a function of the last one alone, which the
    head holds as a table. Pieces are bytes, may cut characters, and are all different; a piece of one byte is that
    byte's own token, so a prompt must not end with it.
    """
    sizes = {"hidden": 512, "ffn": 32, "heads": 2, "kv_heads": 1, "dim": 32}
    long = [piece for piece in script if len(piece) > 1]
    specials = 256 + len(long)
    ids = [piece[0] if len(piece) == 1 else 256 + long.index(piece) for piece in script]
    vocab = specials + 3
    assert vocab <= sizes["hidden"] and len(set(ids)) == len(ids)
    scale = np.sqrt(sizes["hidden"])
    embed = np.eye(vocab, sizes["hidden"]) * scale                 # a direction for each token; RMSNorm leaves it as it is
    follower = np.full(vocab, ids[0])
    follower[ids] = [*ids[1:], ids[0] if loop else specials + 1]   # specials + 1 is EOS
    head = np.zeros((vocab, sizes["hidden"]))
    head[follower, np.arange(vocab)] = 20 / scale                  # logit 20 for what follows, 0 for all else
    tensors = {"model.embed_tokens.weight": embed, "lm_head.weight": head, "model.norm.weight": np.ones(sizes["hidden"])}
    tensors |= _layer(0, sizes, np.zeros)
    _write(folder, long, [BOS, EOS, START], tensors, _config(sizes, 1), template)
    return folder

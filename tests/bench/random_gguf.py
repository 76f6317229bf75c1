"""Writes a GGUF file of a real model's shape with random weights, for timing both programs on the same bytes where the model
itself cannot be had: the speed of a step does not depend on values. It has a tokenizer of single bytes and fillers."""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np

SHAPES = {"qwen3-0.6b": {"arch": "qwen3", "layers": 28, "hidden": 1024, "ffn": 3072, "heads": 16, "kv_heads": 8, "dim": 128,
                         "vocab": 151936, "n_ctx": 40960, "theta": 1e6, "eps": 1e-6}}
KINDS = {"bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}


def rows(rng: np.random.Generator, kind: str, n: int, k: int) -> np.ndarray:
    """[n][bytes of a row]: values of variance 1/k. A tile of 64 rows repeats."""
    tile = min(n, 64)
    if kind == "bf16":
        values = (rng.standard_normal((tile, k)) * k**-0.5).astype(np.float32)
        data = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    else:
        codes, levels = (32, 127) if kind == "q8_0" else (16, 8)
        blocks = np.zeros((tile, k // 32), dtype=[("scale", "<f2"), ("codes", "u1", codes)])
        blocks["scale"] = (3 / k) ** 0.5 / levels
        blocks["codes"] = rng.integers(0, 256, blocks["codes"].shape, dtype=np.uint8)
        data = blocks.view(np.uint8).reshape(tile, -1)
    return np.resize(data, (n, data.shape[1]))


def byte_alphabet() -> list[str]:
    """Character i stands for byte i in a byte-level vocabulary (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) if b in plain else chr(256 + others.index(b)) for b in range(256)]


def write(path: Path, shape: dict, kind: str, seed: int = 0) -> None:
    """One file; `kind` is that of every matrix, the tied embedding included."""
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(path, shape["arch"])
    w.add_context_length(shape["n_ctx"])
    w.add_embedding_length(shape["hidden"])
    w.add_block_count(shape["layers"])
    w.add_feed_forward_length(shape["ffn"])
    w.add_head_count(shape["heads"])
    w.add_head_count_kv(shape["kv_heads"])
    w.add_key_length(shape["dim"])
    w.add_value_length(shape["dim"])
    w.add_layer_norm_rms_eps(shape["eps"])
    w.add_rope_freq_base(shape["theta"])
    tokens = byte_alphabet() + [f"<filler{i}>" for i in range(shape["vocab"] - 256)]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2")
    w.add_token_list(tokens)
    w.add_token_types([1] * len(tokens))
    w.add_token_merges([f"{tokens[ord('a')]} {tokens[ord('b')]}"])
    w.add_eos_token_id(len(tokens) - 1)

    def matrix(name: str, n: int, k: int) -> None:
        data = rows(rng, kind, n, k)
        w.add_tensor(name, data, raw_dtype=KINDS[kind])

    def vector(name: str, n: int) -> None:
        w.add_tensor(name, np.ones(n, np.float32))

    hidden, q, kv = shape["hidden"], shape["heads"] * shape["dim"], shape["kv_heads"] * shape["dim"]
    matrix("token_embd.weight", shape["vocab"], hidden)
    vector("output_norm.weight", hidden)
    for i in range(shape["layers"]):
        for name, n, k in (("attn_q", q, hidden), ("attn_k", kv, hidden), ("attn_v", kv, hidden), ("attn_output", hidden, q),
                           ("ffn_gate", shape["ffn"], hidden), ("ffn_up", shape["ffn"], hidden), ("ffn_down", hidden, shape["ffn"])):
            matrix(f"blk.{i}.{name}.weight", n, k)
        for name, n in (("attn_norm", hidden), ("ffn_norm", hidden), ("attn_q_norm", shape["dim"]), ("attn_k_norm", shape["dim"])):
            vector(f"blk.{i}.{name}.weight", n)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to put the files")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for kind in options.kinds:
        path = options.folder / f"{options.shape}-{kind}.gguf"
        write(path, SHAPES[options.shape], kind)
        print(path)


if __name__ == "__main__":
    main()

"""Whole models from GGUF files of one kind of block, on every instruction set, against the reference, which multiplies with the file's values in
float32."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from kvrun.backends import cpu
from kvrun.backends.native import ISAS, lib
from kvrun.blueprint import Blueprint, Shape
from kvrun.hub import resolve
from kvrun.runtime import open_engine

from ..bench.random_gguf import write
from .running import logits_of
from .test_cache_formats import spread

GRANTED = [isa for isa, number in ISAS.items() if number <= lib.kv_cpu_isa()]
SHAPE = {"arch": "qwen3", "layers": 2, "hidden": 96, "ffn": 160, "heads": 4, "kv_heads": 2, "dim": 32, "vocab": 300, "n_ctx": 512, "theta": 1e4, "eps": 1e-6}
HELD = {"q8_0": "q8", "q4_0": "q4s"}


class BlocksModel:
    """A random model whose matrices, the tied embedding and head included, are all blocks of one kind."""

    def __init__(self, folder: Path, kind: str, seed: int) -> None:
        write(folder / "tiny.gguf", SHAPE, kind, seed)
        self.files, self.ids = resolve(str(folder / "tiny.gguf")), np.random.default_rng(seed).integers(0, 256, 40).tolist()
        with Blueprint(self.files, Shape("cpu")) as blueprint:
            assert {matrix.dtype for matrix in blueprint.packed} == {HELD[kind]}

    def logits(self, device: str, prefill: bool = True) -> np.ndarray:
        """float32 [ids][vocab], in steps of 16 prompt rows or of one decode row."""
        engine = open_engine(self.files, device=device, n_ctx=256, kv="f32", threads=1, max_out=16, prefill_chunk=16)
        logits = logits_of(engine, self.ids, chunk=16 if prefill else 1, prefill=prefill)
        engine.close()
        return logits


@pytest.mark.parametrize("isa", GRANTED)
@pytest.mark.parametrize("kind", HELD)
def test_cpu(tmp_path, monkeypatch, kind, isa):
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    model = BlocksModel(tmp_path, kind, seed)
    want = model.logits("reference")
    monkeypatch.setattr(cpu, "best_isa", lambda: isa)
    for prefill in (True, False):
        error = spread(model.logits("cpu", prefill), want)
        # AMX multiplies prompt rows with weights in bfloat16; weights in bytes are multiplied with decode rows in 16 bits.
        assert error <= (0.02 if prefill and isa == "amx" else 3e-6 if prefill or isa == "plain" else 3e-4)

"""Tiny random models made by transformers, their logits, and the reference executor's for the same ids."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kvrun.backends.batch import Batch
from kvrun.backends.reference import ReferenceExecutor
from kvrun.cache.pool import Pool
from kvrun.models import build_plan, check_tensors, load_spec, tensor_refs

BOUND = 1e-4        # of the largest logit; errors of one part in a thousand in any constant give more


@dataclass
class Tiny:
    """A random model: transformers' own, and where it was saved."""

    model: torch.nn.Module
    folder: Path
    seed: int

    @property
    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    def ids(self, count: int) -> list[int]:
        vocab = self.model.get_input_embeddings().weight.shape[0]
        return np.random.default_rng(self.seed).integers(0, vocab, count).tolist()


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights that make every part count: norm weights and biases too, which transformers leaves at one and zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1:
                plain_norm = name.endswith("norm.weight") and float(p.mean()) > 0.5
                p.copy_((1.0 if plain_norm else 0.0) + 0.4 * noise)
            elif p.dim() == 2:
                p.copy_(noise * (0.7 if "embed" in name else 1.2 * p.shape[1] ** -0.5))
            else:
                p.copy_(0.1 * noise)


def make_tiny(config, folder: Path) -> Tiny:
    """Builds the architecture that `config` (a transformers config) names, with random weights, and saves it."""
    from transformers import AutoModelForCausalLM

    seed = random.SystemRandom().randrange(2**32)
    print(f"weights and ids from seed {seed}")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    return Tiny(model, folder, seed)


@torch.inference_mode()
def expected_logits(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    """float32 [len(ids)][vocab], by transformers in one forward pass."""
    return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()


class Reference:
    """The reference executor over one model, with a float32 cache."""

    def __init__(self, config: dict, source, kind: str, n_ctx: int, chunk: int):
        self.spec = load_spec(config, "config.json", n_ctx=n_ctx)
        self.chunk = chunk
        refs = tensor_refs(self.spec, config, kind)
        check_tensors(self.spec, refs, source)
        plan = build_plan(self.spec, max_rows=chunk, max_out=chunk)
        self.pool = Pool(plan.groups, n_ctx=n_ctx, chunk=chunk, kv=("f32", "f32"))
        self.executor = ReferenceExecutor(plan, source, refs, self.pool)
        self.sequence = self.pool.sequence()

    def feed(self, ids: list[int], prefill: bool = True) -> np.ndarray:
        """Logits [len(ids)][vocab] of the next ids, in steps of `chunk` rows."""
        rows = []
        for start in range(0, len(ids), self.chunk):
            part = ids[start:start + self.chunk]
            first = self.sequence.length
            self.sequence.extend(len(part))
            self.executor.step(Batch(tokens=part, positions=list(range(first, first + len(part))), prefill=prefill,
                                     tables=[[t] for t in self.sequence.tables()], out_rows=list(range(len(part)))))
            rows.append(self.executor.logits().copy())
        return np.concatenate(rows)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.executor.close()


def reference_logits(config: dict, source, kind: str, ids: list[int], chunk: int, n_ctx: int | None = None) -> np.ndarray:
    """Logits [len(ids)][vocab] from an empty cache, in chunks."""
    with Reference(config, source, kind, n_ctx or len(ids), chunk) as reference:
        return reference.feed(ids)


def assert_close(got: np.ndarray, want: np.ndarray, what: str = "") -> None:
    """Within BOUND of the largest logit; and the logits must not be flat, or they would prove nothing."""
    scale = float(np.abs(want).max())
    assert np.isfinite(scale) and scale > 0
    assert float(want.std(axis=1).min()) > 0.01 * scale, "flat logits prove nothing"
    worst = float(np.abs(got - want).max())
    assert worst <= BOUND * scale, f"{what}: off by {worst:.3g} of at most {scale:.3g}"

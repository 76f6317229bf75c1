"""The reference executor: plain torch in float32. It says what every op of kernels/kvrun.h means, and tests compare
every other executor with it. Read it next to that header; it favours plainness over speed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

from kvrun.backends.batch import Batch
from kvrun.backends.plan import Buffer, CacheRef, Plan, Table, Vector, Weight
from kvrun.backends.reference_cache import PLAIN, LayerPages
from kvrun.backends.sampling import draw
from kvrun.cache.formats import PAGE
from kvrun.errors import ModelError, NumericError
from kvrun.models.ops import GELU_TANH, QK_HEAD, QK_NONE
from kvrun.models.spec import TensorRef
from kvrun.weights.source import RawTensor, TensorSource


def as_float32(raw: RawTensor) -> torch.Tensor:
    """The tensor's values, float32, in its own shape. GGUF blocks go through the gguf package."""
    if raw.dtype in PLAIN:
        values = torch.frombuffer(bytearray(raw.data), dtype=PLAIN[raw.dtype])
        return values.to(torch.float32).reshape(raw.shape)
    from gguf import GGMLQuantizationType, dequantize

    blocks = np.frombuffer(raw.data, dtype=np.uint8).reshape(*raw.shape[:-1], -1)
    return torch.from_numpy(dequantize(blocks, GGMLQuantizationType[raw.dtype.upper()])).reshape(raw.shape)


def read_tensor(source: TensorSource, ref: TensorRef) -> torch.Tensor:
    """What `ref` names, float32, with q/k rows in Hugging Face order."""
    w = as_float32(source.read(ref.name, ref.start, ref.stop)) + ref.add
    if ref.unpermute_heads:
        # GGUF interleaves the two halves of each head, for RoPE on neighbours: [heads][dim/2][2] -> [heads][2][dim/2].
        w = w.reshape(ref.unpermute_heads, -1, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)
    return w


class ReferenceExecutor:
    """See kvrun.backends.executor.Executor. Reads all weights at once as float32; source may be closed after it.

    Raises ModelError for a weight whose rows are not as many as the plan says.
    """

    name = "reference"

    def __init__(self, plan: Plan, source: TensorSource, refs: Mapping[str, TensorRef], pool,
                 like: ReferenceExecutor | None = None):
        """like: an executor of the same model, whose weights are then shared and not read again."""
        self.plan, self.kv, self.appended, self._pool, self._n_out = plan, pool.kv, 0, pool, 0
        self._values: dict[object, torch.Tensor] = {}
        for operand in (*plan.weights, *plan.vectors):
            self._values[operand] = like._values[operand] if like else self._read(operand, source, refs)
        for buffer in plan.buffers:
            self._values[buffer] = torch.zeros(plan.buffer_rows(buffer), buffer.dim)
        self._layers: dict[CacheRef, LayerPages] = {}
        for op in plan.ops:
            for operand in op.fields.values():
                if isinstance(operand, Table):
                    self._values[operand] = torch.tensor(operand.values, dtype=torch.float32)
                if isinstance(operand, CacheRef) and operand not in self._layers:
                    self._layers[operand] = LayerPages(pool.groups[operand.group], operand.index,
                                                       op.fields["kv_heads"], op.fields["head_dim"])

    @staticmethod
    def _read(operand: Weight | Vector, source: TensorSource, refs: Mapping[str, TensorRef]) -> torch.Tensor:
        parts = [read_tensor(source, refs[name]) for name in operand.parts]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        shape = (operand.n, operand.k) if isinstance(operand, Weight) else (operand.dim,)
        if tuple(value.shape) != shape:
            raise ModelError(f"{operand.name}: shape {list(value.shape)} in the file, {list(shape)} in the config")
        return value

    @torch.inference_mode()
    def step(self, batch: Batch) -> list[int]:
        """See Executor.step. ValueError for a batch larger than the plan or a token outside the vocabulary."""
        rows, out = len(batch.tokens), len(batch.out_rows)
        if not 0 < rows <= self.plan.max_rows or out > self.plan.max_out:
            raise ValueError(f"a step of {rows} rows and {out} outputs; the plan has {self.plan.max_rows} and {self.plan.max_out}")
        if not (0 <= min(batch.tokens) and max(batch.tokens) < self.plan.vocab_size):
            raise ValueError(f"a token id outside the vocabulary of {self.plan.vocab_size}")
        self._batch, self._n_out, self._next = batch, out, []
        self._pos = torch.tensor(batch.positions)
        self._seq = torch.tensor(batch.sequences or [0] * rows)
        for op in self.plan.ops:
            getattr(self, f"_{op.kind}")(**op.fields)
        return self._next

    def logits(self) -> np.ndarray:
        """float32 [len(out_rows)][vocab] of the last step; overwritten by the next."""
        return self._values[self.plan.logits][: self._n_out].numpy()

    def close(self) -> None:
        """Gives the memory back. Idempotent."""
        if self._pool is not None:
            self._values, self._layers = {}, {}
            self._pool.close()
            self._pool = None

    # ---- ops, in the order of kvrun.h; parameters are the fields of the structs there ----

    def _rows(self, buffer: Buffer) -> torch.Tensor:
        """The part of a buffer that this step uses: [R][dim] or [O][dim]."""
        return self._values[buffer][: self._n_out if buffer.out else len(self._batch.tokens)]

    def _embed(self, w, out, scale):
        self._rows(out)[:] = scale * self._values[w][torch.tensor(self._batch.tokens)]

    def _norm(self, x, w, out, dim, rows, accumulate, eps, w_offset, scale):
        y = rms_norm(self._rows(x), self._values[w], eps, w_offset)
        self._write(out, scale * y if accumulate else y, accumulate)

    def _linear(self, w, bias, x, out, rows, accumulate, scale, softcap):
        y = scale * F.linear(self._rows(x), self._values[w], None if bias is None else self._values[bias])
        self._write(out, soft_cap(y, softcap), accumulate)

    def _write(self, out, value, accumulate):
        target = self._rows(out)
        target[:] = target + value if accumulate else value

    def _act(self, x, out, dim, kind):
        gate, up = self._rows(x).split(dim, dim=1)
        self._rows(out)[:] = (F.gelu(gate, approximate="tanh") if kind == GELU_TANH else F.silu(gate)) * up

    def _rope(self, inv_freq, out, half, factor):
        angle = self._pos[:, None].float() * self._values[inv_freq]
        self._rows(out)[:] = factor * torch.cat((angle.cos(), angle.sin()), dim=1)

    def _append(self, qkv, rope, q_norm, k_norm, cache, heads, kv_heads, head_dim, rope_dim, interleaved, qk_norm,
                eps, w_offset):
        q, k, v = self._rows(qkv).clone().split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
        turned = []
        for part, norm in ((q, q_norm), (k, k_norm)):
            if qk_norm not in (QK_NONE, QK_HEAD):
                part = rms_norm(part, self._values[norm], eps, w_offset)
            part = part.reshape(len(part), -1, head_dim)
            if qk_norm == QK_HEAD:
                part = rms_norm(part, self._values[norm], eps, w_offset)
            turned.append(part if rope is None else rotate(part, self._rows(rope), rope_dim, interleaved))
        self._rows(qkv)[:, : heads * head_dim] = turned[0].flatten(1)

        layer, tables = self._layers[cache], self._batch.tables[cache.group]
        for s in set(self._seq.tolist()):
            mine = self._seq == s
            layer.append(tables[s], self._pos[mine], turned[0][mine], turned[1][mine], v.reshape(len(v), kv_heads, head_dim)[mine])
        self.appended += len(v)

    def _attend(self, qkv, out, sinks, cache, heads, kv_heads, head_dim, window, scale, softcap):
        tables = self._batch.tables[cache.group]
        for s in set(self._seq.tolist()):
            mine = self._seq == s
            pos = self._pos[mine]
            base = torch.tensor(list(tables[s].base))
            slot_pos = (base[:, None] + torch.arange(PAGE)).flatten()
            visible = slot_pos <= pos[:, None]                                     # [R][slots]
            if window:
                visible &= pos[:, None] - slot_pos < window
            # Slots past the newest token may hold anything, NaN too: leave them out before any arithmetic.
            seen = visible.any(dim=0).nonzero()
            used = slice(int(seen[0]), int(seen[-1]) + 1)
            own = int(pos[0]) // PAGE * PAGE
            k, v = (t[:, used] for t in self._layers[cache].load(tables[s], own))          # [kv_heads][S][head_dim]
            q = self._rows(qkv)[mine, : heads * head_dim].reshape(-1, kv_heads, heads // kv_heads, head_dim)
            scores = torch.einsum("rgjd,gsd->gjrs", q, k)
            scores = soft_cap(scale * scores, softcap).masked_fill(~visible[:, used], -math.inf)
            if sinks is not None:
                sink = self._values[sinks].reshape(kv_heads, -1, 1, 1).expand(-1, -1, len(pos), 1)
                scores = torch.cat((scores, sink), dim=-1)
            weights = scores.softmax(dim=-1)[..., : k.shape[1]]
            self._rows(out)[mine] = torch.einsum("gjrs,gsd->rgjd", weights, v).reshape(len(pos), -1)

    def _gather(self, x, out, dim):
        self._rows(out)[:] = self._rows(x)[torch.tensor(self._batch.out_rows, dtype=torch.long)]

    def _sample(self, logits, vocab):
        if self._batch.sampler is None:
            return
        for row, values in zip(self._batch.out_rows, self._rows(logits).numpy()):
            position = self._batch.positions[row]
            if np.isnan(values).any() or not np.isfinite(values.max()):
                raise NumericError(f"the model gave NaN or Inf at position {position}; its weights may be damaged: "
                                   "try 'kvrun verify'")
            self._next.append(draw(values, self._batch.sampler, self._batch.recent, position))


def rms_norm(x: torch.Tensor, w: torch.Tensor, eps: float, w_offset: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * (w + w_offset) over the last dimension."""
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps) * (w + w_offset)


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(x / cap); 0 is off."""
    return cap * torch.tanh(x / cap) if cap > 0 else x


def rotate(x: torch.Tensor, table: torch.Tensor, rope_dim: int, interleaved: int) -> torch.Tensor:
    """RoPE of the first rope_dim channels. x: [R][heads][head_dim]. table: [R][rope_dim], cos then sin."""
    cos, sin = (t[:, None] for t in table.split(rope_dim // 2, dim=1))
    head, rest = x[..., :rope_dim], x[..., rope_dim:]
    pairs = head.unflatten(-1, (-1, 2)) if interleaved else head.unflatten(-1, (2, -1)).transpose(-1, -2)
    a, b = pairs.unbind(-1)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
    turned = turned if interleaved else turned.transpose(-1, -2)
    return torch.cat((turned.flatten(-2), rest), dim=-1)

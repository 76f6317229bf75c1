"""ModelSpec -> Plan: the one decoder of all families."""

from __future__ import annotations

from kvrun.backends.plan import Buffer, CacheGroup, CacheRef, Op, Plan, Table, Vector, Weight
from kvrun.models.ops import ACT, QK_NORM, ROWS_ALL, ROWS_OUT
from kvrun.models.spec import LayerSpec, ModelSpec


class _Builder:
    """Collects ops. Buffers are [rows][dim], named as in the comments of build_plan."""

    def __init__(self, spec: ModelSpec):
        self.spec, self.ops = spec, []
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.q_dim, self.kv_dim = q, kv
        self.x = Buffer("x", spec.hidden)               # the residual stream
        self.h = Buffer("h", spec.hidden)               # a block's normalized input, then its output
        self.qkv = Buffer("qkv", q + 2 * kv)
        self.att = Buffer("att", q)
        self.gate_up = Buffer("gate_up", 2 * spec.ffn)
        self.act = Buffer("act", spec.ffn)
        self.final = Buffer("final", spec.hidden, out=True)
        self.logits = Buffer("logits", spec.vocab_size, out=True)
        self.ropes = [Buffer(f"rope{i}", r.dim) for i, r in enumerate(spec.ropes)]   # [2][dim/2]: cos, sin

    def op(self, name: str, layer: int, /, **fields: object) -> None:
        self.ops.append(Op(name, layer, fields))

    def norm(self, layer: int, name: str, x: Buffer, out: Buffer, rows: int = ROWS_ALL, accumulate: int = 0) -> None:
        spec = self.spec
        self.op("norm", layer, x=x, w=Vector(name, (name,), spec.hidden), out=out, dim=spec.hidden, rows=rows,
                accumulate=accumulate, eps=spec.norm_eps, w_offset=spec.norm_offset,
                scale=spec.residual_scale if accumulate else 1.0)

    def linear(self, layer: int, w: Weight, bias: Vector | None, x: Buffer, out: Buffer, rows: int = ROWS_ALL,
               accumulate: int = 0, scale: float = 1.0, softcap: float = 0.0) -> None:
        self.op("linear", layer, w=w, bias=bias, x=x, out=out, rows=rows, accumulate=accumulate, scale=scale,
                softcap=softcap)

    def block_input(self, layer: int, name: str) -> Buffer:
        """What a block reads: the residual stream, normalized where the family does that."""
        if not self.spec.pre_norm:
            return self.x
        self.norm(layer, f"layers.{layer}.{name}", self.x, self.h)
        return self.h

    def block_output(self, layer: int, w: Weight, bias: Vector | None, x: Buffer, post_norm: str) -> None:
        """A block's last matrix, added to the residual stream, normalized first where the family does that."""
        if self.spec.post_norm:
            self.linear(layer, w, bias, x, self.h)
            self.norm(layer, f"layers.{layer}.{post_norm}", self.h, self.x, accumulate=1)
        else:
            self.linear(layer, w, bias, x, self.x, accumulate=1, scale=self.spec.residual_scale)

    def matrix(self, layer: int, name: str, parts: tuple[str, ...], n: int, k: int,
               bias: bool) -> tuple[Weight, Vector | None]:
        prefix = f"layers.{layer}."
        names = tuple(prefix + part for part in parts)
        return (Weight(prefix + name, names, n, k),
                Vector(f"{prefix}{name}_bias", tuple(f"{p}_bias" for p in names), n) if bias else None)

    def attention(self, i: int, layer: LayerSpec, cache: CacheRef) -> None:
        spec, prefix = self.spec, f"layers.{i}."
        x = self.block_input(i, "attn_norm")
        self.linear(i, *self.matrix(i, "qkv", ("q", "k", "v"), self.q_dim + 2 * self.kv_dim, spec.hidden,
                                    spec.qkv_bias), x, self.qkv)
        whole = spec.qk_norm == "whole"
        q_norm = k_norm = None
        if spec.qk_norm != "none":
            q_norm = Vector(prefix + "q_norm", (prefix + "q_norm",), self.q_dim if whole else spec.head_dim)
            k_norm = Vector(prefix + "k_norm", (prefix + "k_norm",), self.kv_dim if whole else spec.head_dim)
        shape = dict(heads=spec.heads, kv_heads=spec.kv_heads, head_dim=spec.head_dim)
        rope = None if layer.rope is None else spec.ropes[layer.rope]
        self.op("append", i, qkv=self.qkv, rope=None if rope is None else self.ropes[layer.rope], q_norm=q_norm,
                k_norm=k_norm, cache=cache, **shape, rope_dim=rope.dim if rope else 0,
                interleaved=int(rope.interleaved) if rope else 0, qk_norm=QK_NORM[spec.qk_norm], eps=spec.norm_eps,
                w_offset=spec.norm_offset)
        self.op("attend", i, qkv=self.qkv, out=self.att, sinks=None, cache=cache, **shape, window=layer.window,
                scale=spec.attn_scale, softcap=spec.attn_softcap)
        self.block_output(i, *self.matrix(i, "o", ("o",), spec.hidden, self.q_dim, spec.o_bias), self.att,
                          "attn_post_norm")

    def mlp(self, i: int) -> None:
        spec = self.spec
        x = self.block_input(i, "mlp_norm")
        self.linear(i, *self.matrix(i, "gate_up", ("gate", "up"), 2 * spec.ffn, spec.hidden, spec.mlp_bias), x,
                    self.gate_up)
        self.op("act", i, x=self.gate_up, out=self.act, dim=spec.ffn, kind=ACT[spec.act])
        self.block_output(i, *self.matrix(i, "down", ("down",), spec.hidden, spec.ffn, spec.mlp_bias), self.act,
                          "mlp_post_norm")


def cache_groups(spec: ModelSpec) -> tuple[CacheGroup, ...]:
    """Layers that share a page table, in order of their first layer."""
    windows = dict.fromkeys(layer.window for layer in spec.layers)
    return tuple(CacheGroup(w, tuple(i for i, layer in enumerate(spec.layers) if layer.window == w), spec.kv_heads,
                            spec.head_dim) for w in windows)


def build_plan(spec: ModelSpec, max_rows: int, max_out: int = 1) -> Plan:
    """The ops of one step of up to max_rows rows, of which up to max_out give logits.

    embed; one RoPE table per kind; per layer attention and MLP; then the wanted rows alone through the last norm and
    the head; then the draw. A tied head names the same Weight as the embedding.
    """
    b = _Builder(spec)
    embed = Weight("embed", ("embed",), spec.vocab_size, spec.hidden)
    head = embed if spec.tied else Weight("head", ("head",), spec.vocab_size, spec.hidden)
    groups = cache_groups(spec)
    cache = {i: CacheRef(g, index) for g, group in enumerate(groups) for index, i in enumerate(group.layers)}

    b.op("embed", -1, w=embed, out=b.x, scale=spec.embed_scale)
    for i, rope in enumerate(spec.ropes):
        b.op("rope", -1, inv_freq=Table(f"inv_freq{i}", rope.inv_freq), out=b.ropes[i], half=rope.dim // 2,
             factor=rope.attention_factor)
    for i, layer in enumerate(spec.layers):
        b.attention(i, layer, cache[i])
        b.mlp(i)
    b.op("gather", -1, x=b.x, out=b.final, dim=spec.hidden)
    b.norm(-1, "norm", b.final, b.final, rows=ROWS_OUT)
    b.linear(-1, head, None, b.final, b.logits, rows=ROWS_OUT, scale=spec.logit_scale, softcap=spec.logit_softcap)
    b.op("sample", -1, logits=b.logits, vocab=spec.vocab_size)
    return Plan(tuple(b.ops), groups, spec.vocab_size, max_rows, max_out, b.logits)

"""The plan: a flat list of ops over named buffers, read by every executor.

An op is (kind, layer, fields); kind and field names are those of `kv_op` and its structs in kernels/kvrun.h, which
is the only declaration of an op. In the fields a `Buffer` stands for its memory, a `Weight` for a packed matrix, a
`Vector` for float32 parameters, a `Table` for float32 constants, a `CacheRef` for a layer's part of the page pool,
None for a null pointer; numbers stand for themselves. An executor turns these into pointers or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Buffer:
    """float32 activations, [rows][dim]; rows is max_out of the plan when `out` is set, else max_rows."""

    name: str
    dim: int
    out: bool = False


@dataclass(frozen=True)
class Weight:
    """A matrix [n][k]: the rows of the model's canonical tensors `parts`, one after the other."""

    name: str
    parts: tuple[str, ...]
    n: int
    k: int


@dataclass(frozen=True)
class Vector:
    """float32 parameters [dim]: the model's canonical tensors `parts`, one after the other (norm weights, biases)."""

    name: str
    parts: tuple[str, ...]
    dim: int


@dataclass(frozen=True)
class Table:
    """float32 constants known from the config alone (RoPE inverse frequencies)."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class CacheRef:
    """Layer number `index` of layer group `group`."""

    group: int
    index: int


@dataclass(frozen=True)
class Op:
    """One op. kind: the kv_op union member ("embed", "norm", ...). layer: -1 outside layers."""

    kind: str
    layer: int
    fields: dict[str, object]


@dataclass(frozen=True)
class CacheGroup:
    """Layers that share a page table: the same window, KV heads and head size.

    window: 0 for full attention, else how many positions a query sees, itself included.
    """

    window: int
    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Plan:
    """Ops for up to max_rows rows, of which up to max_out give logits."""

    ops: tuple[Op, ...]
    groups: tuple[CacheGroup, ...]
    vocab_size: int
    max_rows: int
    max_out: int
    logits: Buffer = field(default=Buffer("logits", 0, True))

    def _operands(self, kind: type) -> tuple:
        seen = {}
        for op in self.ops:
            for value in op.fields.values():
                if isinstance(value, kind):
                    if seen.setdefault(value.name, value) != value:
                        raise ValueError(f"two different {kind.__name__} operands are named {value.name!r}")
        return tuple(seen.values())

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Every buffer once, in order of first use."""
        return self._operands(Buffer)

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Every matrix once (a tied embedding and head share one), in order of first use."""
        return self._operands(Weight)

    @property
    def vectors(self) -> tuple[Vector, ...]:
        """Every parameter vector once, in order of first use."""
        return self._operands(Vector)

    def buffer_rows(self, buffer: Buffer) -> int:
        """Rows that `buffer` has memory for."""
        return self.max_out if buffer.out else self.max_rows

    def buffer_bytes(self) -> int:
        """Bytes of all activations."""
        return sum(4 * b.dim * self.buffer_rows(b) for b in self.buffers)

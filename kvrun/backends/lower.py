"""Turns a Plan into the kv_op array that native executors walk."""

from __future__ import annotations

from collections.abc import Callable

from kvrun.backends.native import DTYPES, ffi, lib
from kvrun.backends.plan import Plan

Resolve = Callable[[object], object]
"""Operand of a plan (Buffer, Weight, Vector, Table, CacheRef) -> pointer or struct initializer."""


def lower(plan: Plan, resolve: Resolve) -> object:
    """kv_op[len(plan.ops)]. Every field of an op's struct must be given and no other: ValueError else."""
    ops = ffi.new("kv_op[]", len(plan.ops))
    for op, target in zip(plan.ops, ops, strict=True):
        names = {name for name, _ in ffi.typeof(f"kv_op_{op.kind}").fields}
        if names != op.fields.keys():
            raise ValueError(f"op {op.kind}: fields {sorted(names ^ op.fields.keys())} differ from kvrun.h")
        target.kind = getattr(lib, f"KV_OP_{op.kind.upper()}")
        target.layer = op.layer
        struct = getattr(target, op.kind)
        for name, value in op.fields.items():
            if value is None:
                value = ffi.NULL
            elif not isinstance(value, (int, float)):
                value = resolve(value)
            setattr(struct, name, value)
    return ops


def without_memory(operand: object, kv: tuple[str, str]) -> object:
    """A `resolve` that gives shapes, formats and null pointers: for asking what scratch a plan needs before loading."""
    from kvrun.backends.plan import CacheRef, Weight

    if isinstance(operand, Weight):
        return {"dtype": lib.KV_F32, "n": operand.n, "k": operand.k}
    if isinstance(operand, CacheRef):
        return {"group": operand.group, "k_dtype": DTYPES[kv[0]], "v_dtype": DTYPES[kv[1]]}
    return ffi.NULL

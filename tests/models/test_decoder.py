"""Plans say exactly what kernels/kvrun.h declares, and share what is one thing."""

import importlib.util
from pathlib import Path

import pytest
from cffi import FFI

from kvrun.backends.plan import Buffer, CacheRef, Table, Vector, Weight
from kvrun.models import build_plan, load_spec, ops
from kvrun.models.tensors import canonical_shapes

from .test_config import CONFIGS, GEMMA3_1B, LLAMA31, SMOLLM2
from .test_families import CASES, config_of

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.fixture(scope="module")
def header():
    """cffi's reading of kvrun.h, made as the build makes it."""
    module = importlib.util.spec_from_file_location("gen_abi", KERNELS / "gen_abi.py")
    gen_abi = importlib.util.module_from_spec(module)
    module.loader.exec_module(gen_abi)
    ffi = FFI()
    ffi.cdef(gen_abi.declarations((KERNELS / "kvrun.h").read_text()))
    return ffi


def specs():
    for name, config in CONFIGS.items():
        yield name, load_spec(config, name)
    for name in CASES:
        made = config_of(name)
        yield name, load_spec(made.to_dict() | dict(architectures=[
            "Gemma3ForCausalLM" if "Gemma3" in type(made).__name__ else type(made).__name__.replace("Config", "ForCausalLM")]), name)


SPECS = dict(specs())


@pytest.mark.parametrize("name", SPECS)
def test_ops_have_the_fields_of_their_structs(header, name):
    kinds = {"kv_weight": Weight, "kv_cache": CacheRef}
    for op in build_plan(SPECS[name], max_rows=4).ops:
        fields = dict(header.typeof(f"kv_op_{op.kind}").fields)
        assert fields.keys() == op.fields.keys()
        for key, value in op.fields.items():
            kind = fields[key].type
            if kind.kind == "pointer":
                assert value is None or isinstance(value, (Buffer, Vector, Table)), (op.kind, key)
            elif kind.kind == "struct":
                assert isinstance(value, kinds[kind.cname.removeprefix("struct ")]), (op.kind, key)
            else:
                assert type(value) in ((int, float) if kind.cname in ("float", "double") else (int,)), (op.kind, key)


def test_enum_values_are_those_of_the_header(header):
    values = {}
    for enum in ("kv_rows", "kv_act", "kv_qk_norm"):
        values |= header.typeof(f"enum {enum}").relements
    assert {f"KV_{k}": v for k, v in vars(ops).items() if k.isupper() and isinstance(v, int)} == values


@pytest.mark.parametrize("name", SPECS)
def test_shapes_agree(name):
    """Every op reads and writes rows of the width it says, and weights are as large as their tensors."""
    spec = SPECS[name]
    shapes, plan = canonical_shapes(spec), build_plan(spec, max_rows=4)
    for w in plan.weights:
        assert w.n == sum(shapes[p][0] for p in w.parts) and {shapes[p][1] for p in w.parts} == {w.k}
    for v in plan.vectors:
        assert v.dim == sum(shapes[p][0] for p in v.parts)
    for op in plan.ops:
        f = op.fields
        if op.kind == "linear":
            assert (f["x"].dim, f["out"].dim) == (f["w"].k, f["w"].n)
            assert f["bias"] is None or f["bias"].dim == f["w"].n
        if op.kind == "act":
            assert (f["x"].dim, f["out"].dim) == (2 * f["dim"], f["dim"])
        if op.kind == "rope":
            assert f["out"].dim == 2 * f["half"] == 2 * len(f["inv_freq"].values)
        if op.kind == "append":
            assert f["qkv"].dim == (f["heads"] + 2 * f["kv_heads"]) * f["head_dim"]
            assert (f["rope"].dim if f["rope"] else 0) == f["rope_dim"] <= f["head_dim"]
    assert sum(op.kind == "append" for op in plan.ops) == len(spec.layers)


def test_tied_models_share_one_weight_and_others_do_not():
    tied = build_plan(load_spec(SMOLLM2, "x"), 4)
    head = next(op.fields["w"] for op in reversed(tied.ops) if op.kind == "linear")
    assert head is tied.ops[0].fields["w"] and len(tied.weights) == 1 + 4 * 30
    untied = build_plan(load_spec(LLAMA31, "x"), 4)
    assert len(untied.weights) == 2 + 4 * 30 and {"embed", "head"} <= {w.name for w in untied.weights}


def test_layers_are_grouped_by_window():
    plan = build_plan(load_spec(GEMMA3_1B, "x"), max_rows=16, max_out=3)
    sliding, full = plan.groups
    assert (sliding.window, full.window) == (512, 0) and full.layers == (5, 11, 17, 23)
    assert sorted(sliding.layers + full.layers) == list(range(26))
    refs = [op.fields["cache"] for op in plan.ops if op.kind == "append"]
    assert [(plan.groups[r.group].layers[r.index]) for r in refs] == list(range(26))
    assert plan.buffer_rows(plan.logits) == 3 and plan.logits.dim == plan.vocab_size == 262144
    ropes = {op.layer: op.fields["rope"].name for op in plan.ops if op.kind == "append"}
    assert ropes[0] != ropes[5] and ropes[5] == ropes[11]

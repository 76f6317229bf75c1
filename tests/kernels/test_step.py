"""The plan walker: what it refuses, what it skips, and that a plan gives the same on any number of threads."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from kvrun.backends.native import DTYPES, ISAS, ffi, lib

from .plans import GRANTED, Cache, Machine, floats, pointer, poisoned


def norm(x, out, **changed):
    return ("norm", {"x": pointer(x), "w": pointer(x), "out": pointer(out), "dim": x.shape[1], "eps": 1e-5} | changed)


def refused(machine, ops, **state):
    """kv_cpu_step says KV_BAD_PLAN; scratch is taken as given."""
    state = {"n_rows": 1, "n_seqs": 1, **state}
    zeros = np.zeros(64, np.int32)
    arrays = {name: pointer(zeros, "int32_t *") for name in ("token", "pos", "seq", "out_row", "next")}
    c_state = ffi.new("kv_state *", arrays | state)
    plan = ffi.new("kv_op[]", max(1, len(ops)))
    for op, (kind, fields) in zip(plan, ops, strict=len(ops) > 0):
        op.kind = getattr(lib, f"KV_OP_{kind.upper()}")
        setattr(op, kind, fields)
    room = np.zeros(1 << 20, np.uint8)
    scratch = pointer(room[-room.ctypes.data % 64 :], "void *")
    status = lib.kv_cpu_step(machine.cpu, plan, len(ops), c_state, scratch)
    assert status == c_state.status
    return status == lib.KV_BAD_PLAN


def test_bad_plans_are_refused(machine, rng):
    x, out = floats(rng, 1, 32), poisoned(1, 32)
    good = norm(x, out)
    assert not refused(machine, [good])
    out[:] = np.nan
    cache = {"kv_heads": 2, "heads": 4, "head_dim": 32, "cache": Cache(1, 2, 32).fields()}
    weight = {"n": 16, "k": 32, "dtype": DTYPES["f32"]}
    bad = [
        norm(x, out, dim=0), norm(x, out, rows=2), ("act", {"dim": -1}), ("act", {"dim": 16, "kind": 9}), ("rope", {"half": 0}),
        ("append", cache | {"head_dim": 31}), ("append", cache | {"rope_dim": 34}), ("append", cache | {"qk_norm": 3}),
        ("append", cache | {"heads": 3}), ("append", cache),                             # the last: no page table
        ("attend", cache | {"kv_heads": 0}), ("attend", cache | {"window": -1}), ("attend", cache),
        ("gather", {"dim": 0}), ("sample", {"vocab": 0}),
        ("linear", {"w": weight | {"k": 33}}), ("linear", {"w": weight | {"dtype": DTYPES["q4_k"]}}), ("embed", {"w": weight | {"n": 0}}),
    ]
    for op in bad:
        assert refused(machine, [good, op]), op
    for state in ({"n_rows": 0}, {"n_rows": -1}, {"n_seqs": 0}, {"n_out": 2}, {"n_out": -1}, {"pos": ffi.NULL}, {"seq": ffi.NULL}):
        assert refused(machine, [good], **state), state
    for name, value in (("seq", 1), ("seq", -1), ("pos", -1), ("out_row", 1)):
        array = np.full(4, value, np.int32)
        assert refused(machine, [good], n_out=1, **{name: pointer(array, "int32_t *")}), (name, value)
    assert np.isnan(out).all(), "a refused plan ran"


def test_an_unknown_kind_and_bad_scratch_are_refused(machine, rng):
    zero = pointer(np.zeros(4, np.int32), "int32_t *")
    state = ffi.new("kv_state *", {"n_rows": 1, "n_seqs": 1, "pos": zero, "seq": zero, "token": zero})
    room = np.zeros(256, np.uint8)
    aligned = -room.ctypes.data % 64
    plan = ffi.new("kv_op[]", 1)
    for kind in (-1, lib.KV_OP_COUNT, 1000):
        plan[0].kind = kind
        assert lib.kv_cpu_step(machine.cpu, plan, 1, state, pointer(room[aligned:], "void *")) == lib.KV_BAD_PLAN
        assert lib.kv_cpu_scratch(plan, 1, 1, 1, 1, ISAS[machine.isa]) == -1
    x, out = floats(rng, 1, 16), poisoned(1, 16)
    plan[0].kind, plan[0].norm = lib.KV_OP_NORM, norm(x, out)[1]
    for scratch in (ffi.NULL, pointer(room[aligned + 4 :], "void *")):
        assert lib.kv_cpu_step(machine.cpu, plan, 1, state, scratch) == lib.KV_BAD_PLAN
    assert lib.kv_cpu_step(machine.cpu, plan, 0, state, pointer(room[aligned:], "void *")) == lib.KV_BAD_PLAN
    assert lib.kv_cpu_step(ffi.NULL, plan, 1, state, pointer(room[aligned:], "void *")) == lib.KV_BAD_PLAN
    assert np.isnan(out).all()


def chain(rng, rows, out_rows):
    """Small and large ops in turn, each reading what the one before wrote; some over the wanted rows, some over none."""
    dim = 512
    a, b, c, d, e = (poisoned(rows, n) for n in (dim, dim, 2 * dim, dim, dim))
    x, w = floats(rng, rows, 2 * dim), floats(rng, dim)
    step = {"w": pointer(w), "dim": dim, "eps": 1e-5}
    ops = [
        ("act", {"x": pointer(x), "out": pointer(a), "dim": dim, "kind": lib.KV_SILU}),
        ("norm", step | {"x": pointer(a), "out": pointer(b)}),
        ("gather", {"x": pointer(b), "out": pointer(c), "dim": dim}),
        ("norm", step | {"x": pointer(c), "out": pointer(d), "rows": lib.KV_ROWS_OUT}),
        ("norm", step | {"x": pointer(b), "out": pointer(e)}),
        ("norm", step | {"x": pointer(e), "out": pointer(b), "accumulate": 1, "scale": 0.5}),
    ]
    return ops, [x, w], [a, b, c, d, e]


class Weights:
    """A packed float32 matrix."""

    def __init__(self, rng, n, k):
        self.bytes = np.zeros(lib.kv_pack_bytes(DTYPES["f32"], n, k) + 64, np.uint8)
        self.values = floats(rng, n, k)
        start = self.bytes[-self.bytes.ctypes.data % 64 :]
        weight = ffi.new("kv_weight *", {"data": pointer(start, "void *"), "dtype": DTYPES["f32"], "n": n, "k": k})
        assert lib.kv_pack(weight, 0, n, pointer(self.values, "void *"), DTYPES["f32"]) == lib.KV_OK
        self.fields = {"w": weight[0]}


@pytest.mark.parametrize("isa", GRANTED)
@pytest.mark.parametrize("rows, out_rows", [(1, [0]), (1, []), (3, [2, 0]), (200, [5]), (200, range(200)), (200, [])])
def test_any_number_of_threads_gives_the_same(isa, rng, rows, out_rows):
    results = []
    state = rng.bit_generator.state
    for threads in (1, 2, 3):
        rng.bit_generator.state = state
        with Machine(isa, threads) as machine:
            ops, _keep, buffers = chain(rng, rows, out_rows)
            machine.run(ops, pos=range(rows), out_row=out_rows)
            results.append(np.concatenate([buffer.ravel() for buffer in buffers]))
    assert np.array_equal(results[0], results[1], equal_nan=True) and np.array_equal(results[0], results[2], equal_nan=True)
    assert np.isfinite(results[0][: 2 * rows * 512]).all()


def test_decode_steps_beside_busy_processes(rng):
    """However many threads the executor takes for a step, the result is the same."""
    ops, _keep, buffers = chain(rng, 1, [0])
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        with Machine(GRANTED[-1], 2) as machine:
            linear = Weights(rng, 512, 512)
            out = poisoned(1, 512)
            for step in range(400):
                out[:] = np.nan
                machine.run([*ops, ("linear", linear.fields | {"x": pointer(buffers[4]), "out": pointer(out), "scale": 1.0})], pos=[0], out_row=[0])
                if step == 0:
                    want = out.copy()
                assert np.array_equal(out, want)
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_steps_from_several_python_threads(machine, rng):
    ops, _keep, buffers = chain(rng, 200, [3])
    machine.run(ops, pos=range(200), out_row=[3])
    want = [b.copy() for b in buffers]
    for _ in range(5):
        for b in buffers:
            b[:] = np.nan
        thread = threading.Thread(target=machine.run, args=(ops,), kwargs={"pos": range(200), "out_row": [3]})
        thread.start()
        thread.join()
        assert all(np.array_equal(b, w, equal_nan=True) for b, w in zip(buffers, want, strict=True))


def test_profile_counts_what_ran_and_starts_over(machine, rng):
    ns = ffi.new("int64_t[]", lib.KV_OP_COUNT)
    ops, _keep, _buffers = chain(rng, 200, [3])
    lib.kv_cpu_profile(machine.cpu, ns)
    machine.run(ops, pos=range(200), out_row=[3])
    lib.kv_cpu_profile(machine.cpu, ns)
    ran = {lib.KV_OP_NORM, lib.KV_OP_ACT, lib.KV_OP_GATHER}
    assert all((ns[kind] > 0) == (kind in ran) for kind in range(lib.KV_OP_COUNT))
    lib.kv_cpu_profile(machine.cpu, ns)
    assert list(ns) == [0] * lib.KV_OP_COUNT

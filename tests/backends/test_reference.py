"""What the reference executor promises beyond logits: page layouts, sequences beside each other, bad numbers."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvrun.backends.batch import Batch, PageTable, Sampler
from kvrun.backends.plan import Buffer, CacheRef, CacheGroup, Op, Plan, Vector
from kvrun.backends.reference import ReferenceExecutor
from kvrun.backends.reference_cache import LayerPages
from kvrun.cache.pool import Pool
from kvrun.errors import NumericError
from kvrun.models.spec import TensorRef
from kvrun.weights.source import RawTensor

HEADS, KV, DIM, PAGE = 4, 2, 6, 128


@pytest.fixture
def rng():
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


class Parameters:
    """A TensorSource of float32 vectors."""

    def __init__(self, **values):
        self.values = {k: np.asarray(v, np.float32) for k, v in values.items()}

    def read(self, name, start=0, stop=None):
        return RawTensor(name, "f32", self.values[name].shape, self.values[name].tobytes())


def k_index(slot: int, c: int) -> int:
    """kv_k_index of kernels/page.h."""
    return ((slot // 16) * (DIM // 2) + c // 2) * 32 + (slot % 16) * 2 + c % 2


def v_index(slot: int, c: int) -> int:
    """kv_v_index of kernels/page.h."""
    return ((slot // 2) * DIM + c) * 2 + slot % 2


@pytest.mark.parametrize("k_dtype,v_dtype", [("f32", "f32"), ("f16", "f16"), ("bf16", "bf16"), ("f16", "f32")])
def test_pages_lie_as_the_header_says(rng, k_dtype, v_dtype):
    group = CacheGroup(0, (0, 1, 2), KV, DIM)
    pool = Pool((group,), n_ctx=3 * PAGE, chunk=PAGE, kv=(k_dtype, v_dtype))
    memory = pool.groups[0]
    memory.memory[:] = 0xFF                                   # NaN in every format
    pages = [LayerPages(memory, i, KV, DIM) for i in range(3)]
    page, slot = torch.tensor([2, 0, 2]), torch.tensor([127, 18, 3])
    k, v = (torch.from_numpy(rng.integers(-8, 8, (3, KV, DIM)).astype(np.float32)) for _ in range(2))
    pages[1].k.store(page, slot, k)
    pages[1].v.store(page, slot, v)
    dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    for i in range(3):
        for h in range(KV):
            start = int(page[i]) * memory.page_stride + memory.layer_stride
            for offset, name, values, index in ((0, k_dtype, k, k_index), (memory.v_offset, v_dtype, v, v_index)):
                raw = torch.from_numpy(memory.memory[start + offset:].copy())
                size = dtypes[name].itemsize
                raw = raw[: len(raw) // size * size].view(dtypes[name])[h * PAGE * DIM:]
                assert [float(raw[index(int(slot[i]), c)]) for c in range(DIM)] == values[i, h].tolist()
    got_k, got_v = pages[1].load(PageTable([2], [0]), 0)
    assert torch.equal(got_k[:, 127], k[0]) and torch.equal(got_v[:, 3], v[2])
    written = sum(int(torch.isfinite(half.pages.values.float()).sum()) for p in pages for half in (p.k, p.v))
    assert written == 3 * KV * DIM * 2                        # and nothing else, in no other layer


def attention_plan(window: int, softcap: float, sinks: bool) -> Plan:
    """append and attend alone, over buffers that the test fills."""
    qkv, out = Buffer("qkv", (HEADS + 2 * KV) * DIM), Buffer("out", HEADS * DIM)
    shape = dict(heads=HEADS, kv_heads=KV, head_dim=DIM)
    ops = (Op("append", 0, dict(qkv=qkv, rope=None, q_norm=None, k_norm=None, cache=CacheRef(0, 0), **shape, rope_dim=0,
                                interleaved=0, qk_norm=0, eps=0.0, w_offset=0.0)),
           Op("attend", 0, dict(qkv=qkv, out=out, sinks=Vector("sinks", ("sinks",), HEADS) if sinks else None,
                                cache=CacheRef(0, 0), **shape, window=window, scale=0.4, softcap=softcap)))
    return Plan(ops, (CacheGroup(window, (0,), KV, DIM),), 10, 256, 1, Buffer("logits", 10, True))


@pytest.mark.parametrize("window,softcap,sinks", [(0, 0.0, False), (50, 0.0, False), (0, 3.0, True), (1, 0.0, True)])
def test_sequences_side_by_side_with_holes_and_rubbish(rng, window, softcap, sinks):
    """Rows of two sequences in one step, against attention written out; unseen slots hold NaN."""
    sink = rng.standard_normal(HEADS)
    plan = attention_plan(window, softcap, sinks)
    pool = Pool(plan.groups, n_ctx=8 * PAGE, chunk=8 * PAGE, kv=("f32", "f32"))
    pool.groups[0].memory[:] = 0xFF
    source = Parameters(sinks=sink)
    executor = ReferenceExecutor(plan, source, {"sinks": TensorRef("sinks")}, pool)
    qkv, out = (next(b for b in plan.buffers if b.name == n) for n in ("qkv", "out"))
    # Sequence 0 lost positions 128..383; sequence 1 starts at 0. Pages are out of order.
    tables = [PageTable((5, 1), (0, 3 * PAGE)), PageTable((0, 3), (0, PAGE))]
    rows_of = {0: [*range(PAGE), *range(3 * PAGE, 3 * PAGE + 16)], 1: list(range(PAGE + 7))}
    first = [(s, p) for s in (0, 1) for p in rows_of[s][:-4]]
    last = [(s, rows_of[s][i]) for i in range(-4, 0) for s in (0, 1)]
    kv = {}
    for rows in (first[:150], first[150:], last):
        x = rng.standard_normal((len(rows), qkv.dim)).astype(np.float32)
        executor._values[qkv][: len(rows)] = torch.from_numpy(x)
        executor.step(Batch(tokens=[0] * len(rows), positions=[p for _, p in rows], sequences=[s for s, _ in rows],
                            tables=[tables]))
        for row, (s, p) in enumerate(rows):
            kv[s, p] = x[row, HEADS * DIM:].reshape(2, KV, DIM).astype(np.float64)
        for row, (s, p) in enumerate(rows):
            seen = [o for t, o in kv if t == s and o <= p and (not window or p - o < window)]
            for h in range(HEADS):
                q = x[row, h * DIM:(h + 1) * DIM].astype(np.float64)
                scores = np.array([0.4 * q @ kv[s, o][0, h // 2] for o in seen])
                scores = softcap * np.tanh(scores / softcap) if softcap else scores
                weights = np.exp(scores)
                weights /= weights.sum() + (np.exp(np.float32(sink[h])) if sinks else 0)
                want = weights @ np.array([kv[s, o][1, h // 2] for o in seen])
                got = executor._values[out][row, h * DIM:(h + 1) * DIM].numpy()
                assert got == pytest.approx(want, abs=1e-5)
    assert executor.appended == len(kv)
    executor.close()
    executor.close()


def test_numbers_that_are_not_finite_are_an_error():
    logits = Buffer("logits", 5, True)
    plan = Plan((Op("sample", -1, dict(logits=logits, vocab=5)),), (), 5, 2, 2, logits)
    executor = ReferenceExecutor(plan, Parameters(), {}, SimpleNamespace(groups=[], kv=("f32", "f32"), close=lambda: None))

    def step(values, sampler):
        executor._values[logits][0] = torch.tensor(values)
        return executor.step(Batch(tokens=[1], positions=[9], tables=[], out_rows=[0], sampler=sampler))

    inf, nan = float("inf"), float("nan")
    for bad in ([0, nan, 0, 0, 0], [0, inf, 0, 0, 0], [-inf] * 5):
        with pytest.raises(NumericError, match="position 9"):
            step(bad, Sampler())
        assert step(bad, None) == []
    assert step([-inf, 0, 1, -inf, 0], Sampler()) == [2]
    assert executor.logits().shape == (1, 5)
    for batch in (Batch([5], [0], []), Batch([0] * 3, [0, 1, 2], []), Batch([], [], [])):
        with pytest.raises(ValueError):
            executor.step(batch)

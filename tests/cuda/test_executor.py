"""The CUDA executor, on the emulator and on a GPU where there is one, against the reference: whole tiny models, prompts and answers."""

import numpy as np
import pytest

from kvrun.backends import cuda_product, simt
from kvrun.backends.batch import Batch, PageTable, Sampler
from kvrun.backends.cuda_state import StateBlock
from kvrun.backends.native import ffi
from kvrun.errors import NumericError, UsageError
from kvrun.hub import resolve

from ..backends.running import logits_of
from ..backends.test_cache_formats import spread
from ..backends.test_weight_formats import HELD, BlocksModel
from ..engine.tiny_model import random_model
from .answers import answer, tokens


@pytest.mark.parametrize("kv", ["f32", "f16", "q8", "q4"])
def test_a_tiny_model_answers_as_the_reference_does(open_tiny, rng, kv):
    """32 tokens, each the reference's likeliest after those before it, across a page border."""
    engine, ids = open_tiny("cuda", kv), tokens(rng, 110)
    got = answer(engine, ids, 32)
    assert len(got) == 32 and engine.executor.appended == len(ids) + 31
    logits = logits_of(open_tiny("reference", kv), ids + got[:-1], chunk=16)[len(ids) - 1 :]
    chosen = logits[np.arange(32), got]
    assert (logits.max(axis=1) - chosen <= 1e-3 * logits.std()).all()


@pytest.mark.parametrize("kv,dim,window", [("f32", 64, 0), ("f16", 128, 50), ("q8", 64, 50), ("q8", 96, 0), ("q4", 64, 0), ("q8/q4", 128, 0)])
def test_logits_follow_the_reference(open_tiny, rng, kv, dim, window):
    """Prompt rows and decode rows over several pages, past the window. What the executor adds is little beside the format."""
    ids = tokens(rng, 140)
    exact, want = (logits_of(open_tiny("reference", fmt, dim=dim, window=window), ids, chunk=16) for fmt in ("f32", kv))
    cost = spread(exact, want) if kv != "f32" else 0
    engine = open_tiny("cuda", kv, dim=dim, window=window)
    got = logits_of(engine, ids[:122], chunk=16)
    # Prompt rows round q and the probabilities once, to what the cache has: bfloat16 of a 16-bit one here.
    assert spread(got, want[:122]) <= (1.5 if kv == "f16" else 0.3) * cost + 1e-5
    decoded = []
    while (start := engine.sequence.length) < len(ids):          # the rest in decode rows
        engine.sequence.extend(1)
        engine.executor.step(Batch(tokens=[ids[start]], positions=[start], tables=[[t] for t in engine.sequence.tables()], out_rows=[0]))
        decoded.append(engine.executor.logits()[0].copy())
    assert spread(np.stack(decoded), want[122:]) <= 0.3 * cost + 1e-5


@pytest.mark.parametrize("kind", HELD)
def test_a_file_of_blocks(tmp_path, rng, executor, kind):
    model = BlocksModel(tmp_path, kind, int(rng.integers(2**31)))
    want = model.logits("reference")
    for prefill in (True, False):
        assert spread(model.logits(executor, prefill), want) < (1e-5 if executor == "simt" else 0.02)


def test_products_of_many_rows(open_tiny, rng, monkeypatch, executor):
    """The way of a GPU's prompt rows: dense panels of weights and torch's product."""
    if executor != "simt":
        pytest.skip("a GPU has no other way")
    ids = tokens(rng, 48)
    want = logits_of(open_tiny("cuda", max_out=48, prefill_chunk=48), ids, chunk=48)
    monkeypatch.setattr(simt.SimtDevice, "product", lambda self, own=simt.SimtDevice.product: own(_with_products(self)))
    monkeypatch.setattr("kvrun.backends.cuda_product._PANEL_BYTES", 64 * 4 * 32)           # several panels to a matrix
    engine = open_tiny("cuda", max_out=48, prefill_chunk=48)
    assert engine.executor._product is not None
    assert spread(logits_of(engine, ids, chunk=48), want) < 1e-5


def _with_products(device):
    device._products = True
    return device


def test_draws_are_the_references(open_tiny, rng):
    ids, settings = tokens(rng, 20), {"seed": int(rng.integers(2**62)), "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    assert answer(open_tiny("cuda"), ids, 24, **settings) == answer(open_tiny("reference"), ids, 24, **settings)
    settings["repeat_penalty"] = 1.3
    assert answer(open_tiny("cuda"), ids, 12, **settings) == answer(open_tiny("reference"), ids, 12, **settings)


@pytest.mark.parametrize("kv", ["q8", "q4"])
def test_a_chat_is_saved_and_resumed(open_tiny, tmp_path, kv):
    """Pages and side memory go from the device to the disk and back."""
    from kvrun.cache.session import SessionStore

    from ..engine.test_saved import Chat

    store, folder, n_ctx = SessionStore(tmp_path / "sessions"), tmp_path / "tiny-1-32-0", 256
    unbroken, first = (Chat(open_tiny("cuda", kv, n_ctx=n_ctx), folder, store, name) for name in ("unbroken", "s"))
    said = [unbroken.turn("long " * 20, n=24).ids, unbroken.turn("on", n=8).ids]
    assert first.turn("long " * 20, n=24).ids == said[0]
    first.close()
    resumed = Chat(open_tiny("cuda", kv, n_ctx=n_ctx), folder, store)
    answer = resumed.turn("on", n=8)
    assert answer.ids == said[1] and resumed.told == []
    assert answer.stop.stats.cached_tokens > 120
    unbroken.close()
    resumed.close()


def test_not_finite_weights_are_told(tmp_path, rng, open_tiny):
    from safetensors.numpy import load_file, save_file

    path = random_model(tmp_path / "tiny-1-32-0", 5, layers=1, dim=32) / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][3, 5] = np.nan
    save_file(tensors, path)
    engine = open_tiny("cuda")
    with pytest.raises(NumericError, match="position 3"):
        answer(engine, [1, 2, 3, 4], 4)


def test_memory_is_what_was_planned(open_tiny, tmp_path, executor):
    from kvrun.blueprint import Blueprint, Shape

    engine = open_tiny("cuda", "q8/q4", n_ctx=300)
    with Blueprint(resolve(str(tmp_path / "tiny-1-32-0")), Shape(executor, 1, 16, 16)) as blueprint:
        products = cuda_product.work_bytes(engine.executor.plan) if executor == "cuda" else 0
        assert blueprint.memory("q8/q4", 300).workspace == engine.executor.work_bytes + products


def test_heads_without_a_kernel_are_refused_before_loading(open_tiny):
    with pytest.raises(UsageError, match="no CUDA kernel for heads of 264 channels") as refusal:
        open_tiny("cuda", dim=264)
    assert refusal.value.exit_code == 2 and "\n" not in str(refusal.value)


def test_batches_beyond_the_plan_are_refused(open_tiny):
    engine = open_tiny("cuda")
    step = engine.executor.step
    table = [[PageTable([0], [0])]]
    for batch in (Batch(list(range(17)), list(range(17)), table), Batch([], [], table), Batch([300], [0], table),
                  Batch([1], [0], [[PageTable(range(9), range(0, 9 * 128, 128))]])):
        with pytest.raises(ValueError):
            step(batch)
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        step(Batch([1], [0], table))


def test_the_state_block_holds_a_batch(open_tiny, rng):
    """Every pointer of the block leads to what the batch says, also after the block has moved."""
    plan = open_tiny("cuda").executor.plan
    n = StateBlock.n_bytes_of(plan, 4)
    host, there = np.zeros(n, np.uint8), np.full(n + 16, 0xFF, np.uint8)
    block = StateBlock(plan, 4, host, there.ctypes.data)
    sampler = Sampler(seed=2**64 - 1, temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, repeat_penalty=1.5)
    batch = Batch([7, 8, 9], [130, 131, 132], [[PageTable([3, 1], [0, 128])]], True, None, [2, 0], sampler, [5, 6, 5])
    block.write(batch, 42)
    there[: block.used] = host[: block.used]
    host[:] = 0
    state = ffi.cast("kv_state *", there.ctypes.data)
    assert (state.n_rows, state.n_out, state.n_seqs, state.n_groups, state.prefill, state.appended) == (3, 2, 1, 1, 1, 42)
    assert list(state.token[0:3]) == [7, 8, 9] and list(state.pos[0:3]) == [130, 131, 132] and list(state.seq[0:3]) == [0, 0, 0]
    assert list(state.out_row[0:2]) == [2, 0]
    table = state.table[0]
    assert table.n_pages == 2 and list(table.page[0:2]) == [3, 1] and list(table.base[0:2]) == [0, 128] and table.side == 0
    for one in state.sampler[0:2]:
        assert (one.seed, one.temperature, one.top_k, one.top_p, one.min_p, one.repeat_penalty) == (2**64 - 1, 0.5, 3, 0.25, 0.125, 1.5)
        assert list(one.recent[0 : one.n_recent]) == [5, 6]
    assert block.used <= n and (there[n:] == 0xFF).all()
    assert block.result_bytes == ffi.cast("char *", state.next) - ffi.cast("char *", state) + 4 * plan.max_out

"""Generation over quantized caches: chunks, page borders, rewinds, failures and counts."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvrun.backends.batch import Sampler
from kvrun.cache.formats import PAGE
from kvrun.errors import NumericError, UsageError
from kvrun.hub import resolve
from kvrun.runtime import open_engine

from .running import collect, random_ids
from .tiny_model import random_model

WARM = Sampler(seed=5, temperature=1.0, top_k=50)
FORMATS = ["q8", "q4", "q8/q4", "q4/f16"]


def layers(engine) -> int:
    return len(engine.spec.layers)


def same(device: str, answers: list[list[int]]) -> bool:
    """Whether all are equal. The reference's matrix products round differently for different numbers of rows, and a code
    may flip over that; there the length alone is asked for."""
    return all(a == answers[0] if device == "cpu" else len(a) == len(answers[0]) for a in answers)


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("folder", ["model", "sliding_model"])
def test_chunk_size_does_not_change_the_answer(open_tiny, request, rng, device, kv, folder):
    """A prompt over page borders and an answer over the next one."""
    path, ids = request.getfixturevalue(folder), random_ids(rng, 345)
    chunks = (1, 64, 128, 512) if device == "cpu" else (100, 512)
    answers = [collect(open_tiny(path, kv=kv, prefill_chunk=chunk).generate(ids, sampler=WARM, max_tokens=60)) for chunk in chunks]
    assert len(answers[0].ids) == 60
    assert same(device, [a.ids for a in answers])


def test_steps_end_at_page_borders_where_pages_are_quantized_whole(open_tiny, model, rng):
    ids = random_ids(rng, 300)
    for kv, done in (("q4", [128, 256, 300]), ("f16/q4", [128, 256, 300]), ("q8", [300])):
        answer = collect(open_tiny(model, kv=kv, prefill_chunk=512).generate(ids, max_tokens=1))
        assert [p.done for p in answer.prefills] == done
    answer = collect(open_tiny(model, kv="q4", prefill_chunk=50).generate(ids, max_tokens=1))
    assert [p.done for p in answer.prefills] == [50, 100, 128, 178, 228, 256, 300]


@pytest.mark.parametrize("kv", FORMATS)
def test_a_rewound_cache_answers_as_a_new_one_does(open_tiny, model, rng, device, kv):
    engine = open_tiny(model, kv=kv, prefill_chunk=64)
    first = random_ids(rng, 400)
    collect(engine.generate(first, max_tokens=20))
    for keep in (400, 399, 300, 256, 255, 100, 0):
        ids = first[:keep] + random_ids(rng, 60)
        if keep < len(engine.tokens) and ids[keep] == engine.tokens[keep]:
            ids[keep] = (ids[keep] + 1) % 256
        before, held = engine.executor.appended, len(engine.tokens)
        warm = collect(engine.generate(ids, sampler=WARM, max_tokens=16))
        cold = collect(open_tiny(model, kv=kv, prefill_chunk=64).generate(ids, sampler=WARM, max_tokens=16))
        assert same(device, [warm.ids, cold.ids])
        kept = keep - keep % PAGE if "q4" in kv and keep != held else keep
        assert warm.stop.stats.cached_tokens == kept
        assert engine.executor.appended - before == layers(engine) * (len(ids) - kept + 15)
        assert engine.sequence.length == len(engine.tokens) == len(ids) + 15
        collect(engine.generate(first, max_tokens=20))


@pytest.mark.parametrize("kv", FORMATS)
def test_every_k_and_v_is_computed_once(open_tiny, model, rng, kv):
    """A conversation that only grows is never read again, whatever the pages hold."""
    engine = open_tiny(model, kv=kv)
    ids = random_ids(rng, 200)
    answer = collect(engine.generate(ids, sampler=WARM, max_tokens=300))
    assert engine.executor.appended == layers(engine) * (200 + 299)
    more = [*ids, *answer.ids, *random_ids(rng, 20)]
    collect(engine.generate(more, sampler=WARM, max_tokens=100))
    assert engine.executor.appended == layers(engine) * (len(more) + 99)


@pytest.mark.parametrize("kv", FORMATS)
def test_after_a_failed_step_tokens_and_cache_agree(open_tiny, tmp_path, device, kv):
    """A token whose embedding is damaged gives NaN, in the open page or on the last slot of one."""
    folder = random_model(tmp_path / "damaged", 7)
    weights = load_file(str(folder / "model.safetensors"))
    weights["model.embed_tokens.weight"][200] = np.nan
    save_file(weights, str(folder / "model.safetensors"))
    engine = open_tiny(folder, kv=kv, prefill_chunk=64)
    good = [i % 100 for i in range(150)]
    expected = collect(engine.generate(good, max_tokens=4)).ids
    for bad in (PAGE + 50, 2 * PAGE - 1):
        ids = [i % 100 for i in range(bad)]
        with pytest.raises(NumericError):
            collect(engine.generate([*ids, 200], max_tokens=4))
        assert engine.sequence.length == len(engine.tokens)
        assert engine.tokens == ids[: len(engine.tokens)]
        assert same(device, [collect(engine.generate(good, max_tokens=4)).ids, expected])


@pytest.mark.parametrize("device", ["cpu"], scope="module")
def test_memory_stands_still(open_tiny, model, rng, device):
    def rss_kib() -> int:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])

    engine = open_tiny(model, kv="q4", n_ctx=2304)
    ids = random_ids(rng, 30)
    ids += collect(engine.generate(ids, sampler=WARM, max_tokens=300)).ids
    before = rss_kib()
    answer = collect(engine.generate(ids, sampler=WARM, max_tokens=1900))
    assert len(answer.ids) == 1900
    del answer
    assert rss_kib() - before < 1024


@pytest.mark.parametrize("bias,stays", [(0.5, False), (31.0, False), (-120.0, True)])
def test_biased_keys_keep_8_bits_and_the_user_is_told(tmp_path, rng, bias, stays):
    folder = random_model(tmp_path / "biased", 11, key_bias=bias)
    files = resolve(str(folder))

    def opened(kv: str) -> tuple[tuple[str, str], list[str]]:
        told: list[str] = []
        engine = open_engine(files, device="reference", n_ctx=256, kv=kv, threads=1, notify=told.append)
        collect(engine.generate(random_ids(rng, 140), max_tokens=2))
        formats = engine.executor.kv
        engine.close()
        return formats, told

    formats, told = opened("q4")
    assert formats == ("q8" if stays else "q4", "q4")
    assert bool(told) == stays
    if stays:
        assert "120" in told[0] and "(q8)" not in told[0] and "q8/q4" in told[0] and "\n" not in told[0]
        assert opened("q4/q8")[0] == ("q8", "q8")
    for kv in ("q8", "q8/q4"):
        assert opened(kv) == (tuple((kv + "/" + kv).split("/")[:2]), [])


def test_heads_that_fit_no_quantized_page_are_refused(tmp_path, device):
    files = resolve(str(random_model(tmp_path / "odd", 13, dim=40)))
    with pytest.raises(UsageError, match="40 channels.*multiple of 16"):
        open_engine(files, device=device, n_ctx=256, kv="q8", threads=1)
    open_engine(files, device=device, n_ctx=256, kv="f16", threads=1).close()

"""Prefill, decode, prefix reuse, stopping: what the cache holds is what was said."""

import pytest

from kvrun.backends.batch import Sampler
from kvrun.errors import ContextFullError, NumericError, UsageError

from .running import collect, random_ids
from .tiny_model import random_model, scripted_model

WARM = Sampler(seed=3, temperature=1.0, top_k=50)


def layers(engine) -> int:
    return len(engine.spec.layers)


def check_same(device: str, ids: list[int], others: list[int]) -> None:
    """Equal answers where some rows were prompt rows in one and decode rows in the other: exact arithmetic gives equal
    answers; the native executor rounds the two kinds of row differently, so there only what came before must be equal."""
    assert len(ids) == len(others) and (device != "reference" or ids == others)


def check_consistent(engine) -> None:
    assert engine.sequence.length == len(engine.tokens)


@pytest.mark.parametrize("sampler", [Sampler(), WARM])
def test_chunk_size_does_not_change_the_answer(open_tiny, model, rng, sampler):
    ids = random_ids(rng, 300)
    answers = [collect(open_tiny(model, prefill_chunk=chunk).generate(ids, sampler=sampler, max_tokens=24))
               for chunk in (1, 7, 64, 512)]
    assert len(answers[0].ids) == 24
    assert all(a.ids == answers[0].ids for a in answers)
    assert [p.done for p in answers[2].prefills] == [64, 128, 192, 256, 300]


def test_every_k_and_v_is_computed_once(open_tiny, model, rng):
    engine = open_tiny(model)
    ids = random_ids(rng, 200)
    answer = collect(engine.generate(ids, sampler=WARM, max_tokens=500))
    assert answer.reason == "length" and len(answer.ids) == 500
    # the last token was drawn and never run
    assert engine.executor.appended == layers(engine) * (200 + 499)
    assert engine.tokens == ids + answer.ids[:-1]
    check_consistent(engine)


def test_a_shared_prefix_is_reused_and_changes_nothing(open_tiny, model, rng):
    engine = open_tiny(model, prefill_chunk=64)
    first = random_ids(rng, 150)
    collect(engine.generate(first, max_tokens=20))
    for keep in (150, 149, 128, 100, 1, 0):
        ids = first[:keep] + random_ids(rng, 60)
        if keep < len(engine.tokens) and ids[keep] == engine.tokens[keep]:
            ids[keep] = (ids[keep] + 1) % 256
        before = engine.executor.appended
        warm = collect(engine.generate(ids, sampler=WARM, max_tokens=16))
        cold = collect(open_tiny(model, prefill_chunk=64).generate(ids, sampler=WARM, max_tokens=16))
        assert warm.ids == cold.ids
        assert warm.stop.stats.cached_tokens == keep and cold.stop.stats.cached_tokens == 0
        assert engine.executor.appended - before == layers(engine) * (len(ids) - keep + 15)
        check_consistent(engine)


def test_a_wholly_cached_prompt_runs_its_last_token_again(open_tiny, model, rng):
    engine = open_tiny(model)
    ids = random_ids(rng, 50)
    first = collect(engine.generate(ids, max_tokens=8))
    again = collect(engine.generate(ids, max_tokens=8))
    assert again.ids == first.ids and again.stop.stats.cached_tokens == 49


def test_going_on_after_an_answer_equals_one_long_answer(open_tiny, model, rng, device):
    """A draw depends on the seed and the position alone, so the cut is not to be seen."""
    ids = random_ids(rng, 30)
    whole = collect(open_tiny(model).generate(ids, sampler=WARM, max_tokens=40))
    engine = open_tiny(model)
    first = collect(engine.generate(ids, sampler=WARM, max_tokens=13))
    rest = collect(engine.generate(ids + first.ids, sampler=WARM, max_tokens=27))
    assert first.ids == whole.ids[:13]
    check_same(device, first.ids + rest.ids, whole.ids)
    assert rest.stop.stats.cached_tokens == 30 + 12


def test_a_window_that_moved_on_is_read_again_and_said(open_tiny, sliding_model, rng):
    engine = open_tiny(sliding_model, prefill_chunk=32)
    first = random_ids(rng, 500)
    collect(engine.generate(first, max_tokens=4))
    ids = first[:100] + random_ids(rng, 30)
    warm = collect(engine.generate(ids, max_tokens=12))
    cold = collect(open_tiny(sliding_model, prefill_chunk=32).generate(ids, max_tokens=12))
    assert warm.ids == cold.ids
    assert len(warm.notices) == 1 and "token 100" in warm.notices[0].text and warm.stop.stats.cached_tokens == 0
    assert not cold.notices
    check_consistent(engine)


@pytest.mark.parametrize("kv", ["f16", "q8", "q4"])
def test_what_was_drawn_is_read_again_as_it_was_drawn(open_tiny, sliding_model, rng, device, kv):
    """The window has moved on, so all is computed again, drawn ids among prompts, and the pages are the same as before."""
    if device != "cpu":
        pytest.skip("sums of matrix libraries depend on the number of rows")
    engine, unbroken = (open_tiny(sliding_model, kv=kv, prefill_chunk=chunk) for chunk in (32, 100))
    ids, question = random_ids(rng, 100), random_ids(rng, 30)
    first = [collect(each.generate(ids, sampler=WARM, max_tokens=300)).ids for each in (engine, unbroken)]
    wanted = collect(unbroken.generate(ids + first[1] + question, sampler=WARM, max_tokens=40))
    collect(engine.generate(ids + first[0] + random_ids(rng, 200), max_tokens=20))
    again = collect(engine.generate(ids + first[0] + question, sampler=WARM, max_tokens=40))
    assert first[0] == first[1] and again.stop.stats.cached_tokens < wanted.stop.stats.cached_tokens
    assert again.ids == wanted.ids
    check_consistent(engine)


@pytest.mark.parametrize("at", ["prefill", "decode"])
def test_an_interrupt_loses_nothing(open_tiny, model, rng, device, at):
    ids = random_ids(rng, 200)
    unbroken = collect(open_tiny(model).generate(ids, sampler=WARM, max_tokens=30))
    engine = open_tiny(model, prefill_chunk=16)
    when = rng.randrange(1, 12)
    seen = []
    events = engine.generate(ids, sampler=WARM, max_tokens=30)
    for event in events:
        seen.append(event)
        kinds = [type(e).__name__.lower() for e in seen]
        if kinds.count("prefill" if at == "prefill" else "token") == when and kinds[-1] == ("prefill" if at == "prefill" else "token"):
            engine.interrupt()
    assert seen[-1].reason == "interrupt"
    said = [e.id for e in seen if type(e).__name__ == "Token"]
    assert said == unbroken.ids[: len(said)] and len(said) == (0 if at == "prefill" else when)
    assert engine.tokens == (ids + said)[: len(engine.tokens)]
    assert len(engine.tokens) == (16 * when if at == "prefill" else 200 + when - 1)
    check_consistent(engine)
    before = engine.executor.appended
    rest = collect(engine.generate(ids + said, sampler=WARM, max_tokens=30 - len(said)))
    check_same("reference" if at == "prefill" else device, said + rest.ids, unbroken.ids)
    # what had been computed was kept: nothing was computed twice
    assert engine.executor.appended - before == layers(engine) * (200 + 29) - before
    assert rest.reason == "length", "an old interrupt does not touch a new generation"


def test_an_interrupt_during_the_last_chunk_draws_nothing(open_tiny, model, rng):
    engine = open_tiny(model)
    events = engine.generate(random_ids(rng, 20), max_tokens=5)
    next(events)
    engine.interrupt()
    stop, = events
    assert stop.reason == "interrupt" and stop.stats.generated_tokens == 0 and len(engine.tokens) == 20


def test_a_generation_dropped_halfway_does_no_harm(open_tiny, model, rng):
    engine = open_tiny(model, prefill_chunk=16)
    ids = random_ids(rng, 100)
    dropped = engine.generate(ids, max_tokens=50)
    for _ in range(rng.randrange(1, 20)):
        next(dropped)
    other = ids[:40] + random_ids(rng, 20)
    answer = collect(engine.generate(other, max_tokens=10))
    assert answer.ids == collect(open_tiny(model).generate(other, max_tokens=10)).ids
    assert list(dropped) == []
    check_consistent(engine)


def test_seeds(open_tiny, model, rng):
    # Each from an empty cache: what the reference computes of a row depends, in its last bits, on the rows read with it.
    ids = random_ids(rng, 40)
    answers = [collect(open_tiny(model).generate(ids, sampler=Sampler(seed=s, temperature=1.0, top_k=50), max_tokens=24)).ids for s in (1, 2, 1)]
    assert answers[0] == answers[2] != answers[1]


def test_the_repeat_penalty_sees_prompt_and_answer(open_tiny, model, rng):
    ids = random_ids(rng, 20)
    answer = collect(open_tiny(model).generate(ids, sampler=Sampler(repeat_penalty=1e6), max_tokens=60))
    # greedy over logits of which every seen one is crushed: nothing comes twice while positive logits are left
    assert len(set(answer.ids)) == 60 and not set(answer.ids) & set(ids)


def test_context_full_while_generating(open_tiny, model, rng):
    engine = open_tiny(model, n_ctx=64)
    ids = random_ids(rng, 60)
    answer = collect(engine.generate(ids, sampler=WARM))
    # every slot is used: 4 drawn tokens are run, and what the last of them gives is said
    assert answer.reason == "context" and len(answer.ids) == 5 and engine.tokens == ids + answer.ids[:4]


def test_a_prompt_that_fills_the_context_exactly(open_tiny, model, rng):
    answer = collect(open_tiny(model, n_ctx=64).generate(random_ids(rng, 64)))
    assert answer.reason == "context" and len(answer.ids) == 1


def test_a_prompt_longer_than_the_context_is_refused_before_any_work(open_tiny, model, rng):
    engine = open_tiny(model, n_ctx=64)
    with pytest.raises(ContextFullError, match=r"65 tokens.* 64\b"):
        engine.generate(random_ids(rng, 65))
    assert engine.executor.appended == 0


def test_an_empty_prompt_is_refused(open_tiny, model):
    with pytest.raises(UsageError, match="empty"):
        open_tiny(model).generate([])


@pytest.mark.parametrize("n", [0, 1, 2])
def test_max_tokens(open_tiny, model, rng, n):
    engine = open_tiny(model)
    answer = collect(engine.generate(random_ids(rng, 10), max_tokens=n))
    assert len(answer.ids) == n and answer.reason == "length" and len(engine.tokens) == 10 + max(0, n - 1)


SCRIPT = [b"Gr", b"\xc3", b"\xbc\xc3", b"\x9fe, ", b"w\xe4\xb8", b"\x96\xe7", b"\x95\x8c", b" and", b" STO", b"P tail", b" end"]
SAID = b"".join(SCRIPT).decode()


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    return scripted_model(tmp_path_factory.mktemp("scripted"), SCRIPT)


def test_eos_ends_the_answer_and_characters_cut_by_tokens_are_whole(open_tiny, scripted):
    engine = open_tiny(scripted)
    answer = collect(engine.generate(engine.text.encode("hi")))
    assert (answer.reason, answer.text) == ("eos", SAID)
    assert all("\ufffd" not in token.text for token in answer.tokens)
    assert len(answer.ids) == len(SCRIPT), "EOS itself is no part of the answer"


@pytest.mark.parametrize("stop", [["STOP"], ["P", "STOP"], ["nothing", "STOP tail", "STOP"]])
def test_a_stop_string_over_two_tokens(open_tiny, scripted, stop):
    engine = open_tiny(scripted)
    answer = collect(engine.generate(engine.text.encode("hi"), stop=stop))
    expected = SAID[: SAID.index("STOP")] if stop[0] != "P" else answer.text
    assert answer.reason == "stop" and answer.text == expected and "STOP" not in answer.text


def test_text_held_back_for_a_stop_string_is_given_at_the_end(open_tiny, scripted):
    engine = open_tiny(scripted)
    answer = collect(engine.generate(engine.text.encode("hi"), stop=[" end of it"]))
    assert (answer.reason, answer.text) == ("eos", SAID) and answer.stop.text == " end"


def test_nan_passes_through_and_leaves_the_cache_in_order(open_tiny, tmp_path, seed):
    import numpy as np
    from safetensors.numpy import load_file, save_file

    folder = random_model(tmp_path / "nan", seed)
    tensors = load_file(folder / "model.safetensors")
    embed = tensors["model.embed_tokens.weight"].copy()
    embed[200] = np.nan
    save_file(tensors | {"model.embed_tokens.weight": embed}, folder / "model.safetensors")
    engine = open_tiny(folder, prefill_chunk=8)
    good = [i % 100 for i in range(20)]
    expected = collect(engine.generate(good, max_tokens=4)).ids
    with pytest.raises(NumericError):
        collect(engine.generate([*good, 7, 200], max_tokens=4))
    check_consistent(engine)
    assert collect(engine.generate(good, max_tokens=4)).ids == expected

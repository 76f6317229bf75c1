"""Past n_ctx: what is dropped is said and counted, what is kept is attended, and the cache stays in order."""

import numpy as np
import pytest

from kvrun.backends.batch import Sampler
from kvrun.cache.formats import PAGE
from kvrun.engine.conversation import Conversation, head_tokens
from kvrun.engine.events import Eviction
from kvrun.errors import ContextFullError, NumericError, UsageError

from .running import collect, random_ids
from .tiny_model import random_model, scripted_model

WARM = Sampler(seed=3, temperature=1.0, top_k=50)
POLICIES = ["window", "strided"]


@pytest.fixture
def evicting(open_tiny):
    """evicting(folder, n_ctx, policy="window", keep=0, ...) -> Engine"""
    def open_(folder, n_ctx, policy="window", keep=0, limit=None, **settings):
        engine = open_tiny(folder, n_ctx=n_ctx, **settings)
        engine.evict(policy, keep, limit=limit)
        return engine
    return open_


def check(engine) -> None:
    """Tokens, positions and pages agree; where a layer sees everything, the first page is there."""
    at = np.array(engine._at)
    assert len(at) == len(engine.tokens)
    placed = at[at >= 0]
    assert (np.diff(placed) > 0).all() and (not len(placed) or placed[-1] == engine.sequence.length - 1)
    assert engine.held == np.isin(placed // PAGE * PAGE, engine.sequence._lead.base).sum() <= engine.n_ctx
    for table, group in zip(engine.sequence.tables(), engine.executor.plan.groups, strict=True):
        assert group.window or not engine.held or table.base[0] == 0


def watched(engine, events):
    """The answer, and the engine checked after every event."""
    def each():
        for event in events:
            check(engine)
            yield event
    return collect(each())


@pytest.mark.parametrize("policy", POLICIES)
def test_an_answer_goes_on_past_the_context(evicting, model, rng, policy):
    engine = evicting(model, 1024, policy)
    ids = random_ids(rng, 800)
    answer = watched(engine, engine.generate(ids, sampler=WARM, max_tokens=900))
    assert answer.reason == "length" and len(answer.ids) == 900 and not answer.notices
    stats = answer.stop.stats
    assert stats.evictions == answer.evictions and stats.reread_tokens == 0
    assert all(e.reason == "n_ctx" and e.tokens == sum(b - a for a, b in e.positions) for e in answer.evictions)
    dropped = [p for e in answer.evictions for a, b in e.positions for p in range(a, b)]
    assert len(set(dropped)) == len(dropped) == stats.evicted_tokens and min(dropped) >= PAGE
    assert engine.tokens == ids + answer.ids[:-1]
    assert engine.held == len(engine.tokens) - stats.evicted_tokens
    assert {p for p in range(len(engine.tokens)) if not engine.sequence.holds(p)} == set(dropped)
    # nothing was computed twice
    assert engine.executor.appended == len(engine.spec.layers) * (800 + 899)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("window", [0, 900])
def test_holes_are_the_same_on_both_executors(tmp_path, seed, rng, policy, window):
    """Prompt rows and decode rows both see holes. The sliding model's window is wider than its context. The native
    executor multiplies weights with rounded activations, so equal is not to the bit; other holes give other answers."""
    pytest.importorskip("kvrun.backends.native")
    from kvrun.hub import resolve
    from kvrun.runtime import open_engine

    folder = random_model(tmp_path / "m", seed, layers=2, window=window)
    ids = random_ids(rng, 1200)
    answers = []
    for device, evict in (("reference", policy), ("cpu", policy), ("reference", None)):
        engine = open_engine(resolve(str(folder)), device=device, n_ctx=768 if evict else 2048, kv="f32", threads=1,
                             prefill_chunk=100, max_out=100)
        try:
            if evict:
                engine.evict(evict)
            answers.append(watched(engine, engine.generate(ids, max_tokens=300, logprobs=2, echo=True)))
        finally:
            engine.close()
    exact, native, without = answers
    assert exact.evictions == native.evictions and len(exact.evictions) >= 5
    # strided keeps pages older than some that it drops
    dropped = [e.positions[0][0] for e in exact.evictions]
    assert (dropped == sorted(dropped)) == (policy == "window")

    def read(answer):
        return np.array([place.logprob for place in answer.stop.prompt_logprobs[1:]])

    assert np.abs(read(exact) - read(native)).mean() < 0.05 < 5 * 0.05 < np.abs(read(exact) - read(without))[800:].mean()
    for a, b in zip(exact.tokens, native.tokens, strict=True):
        assert a.logprob.top[0][1] == pytest.approx(b.logprob.top[0][1], abs=0.5)
        if a.id != b.id:                                  # they part at a near tie alone
            assert a.logprob.top[0][1] - a.logprob.top[1][1] < 0.5
            break


def test_what_is_kept_is_what_is_seen(evicting, open_tiny, tmp_path, seed, rng):
    """With one layer, K and V depend on nothing but the token and its position: dropping a page equals never having had
    it. So the logits after eviction are those of attention over the held positions alone, which changing a dropped
    token shows."""
    folder = random_model(tmp_path / "one", seed, layers=1)
    ids = random_ids(rng, 700)
    engine = evicting(folder, 512)
    first = collect(engine.generate(ids, max_tokens=8, logprobs=1))
    gone = [p for e in first.evictions for a, b in e.positions for p in range(a, b)]
    changed = [(t + 1) % 256 if i in gone else t for i, t in enumerate(ids)]
    again = collect(evicting(folder, 512).generate(changed, max_tokens=8, logprobs=1))
    assert [t.logprob for t in again.tokens] == [t.logprob for t in first.tokens]
    sink = [(ids[0] + 1) % 256, *ids[1:]]
    assert [t.logprob for t in collect(evicting(folder, 512).generate(sink, max_tokens=8, logprobs=1)).tokens] != \
        [t.logprob for t in first.tokens]
    assert [t.logprob for t in collect(open_tiny(folder).generate(ids, max_tokens=8, logprobs=1)).tokens] != \
        [t.logprob for t in first.tokens]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prompt_longer_than_the_context(evicting, model, rng, policy):
    engine = evicting(model, 512, policy, keep=200, prefill_chunk=64)
    ids = random_ids(rng, 1300)
    answer = watched(engine, engine.generate(ids, sampler=WARM, max_tokens=5))
    assert len(answer.ids) == 5 and [p.done for p in answer.prefills][-1] == 1300
    assert answer.stop.stats.prefilled_tokens == 1300 and answer.stop.stats.evicted_tokens == 1304 - engine.held
    assert list(engine.sequence.tables()[0].base[:2]) == [0, 128]
    # a longer prompt with the same front goes on from there
    more = collect(engine.generate(ids + answer.ids + [65] * 40, sampler=WARM, max_tokens=5))
    assert more.stop.stats.prefilled_tokens == 41 and not more.notices
    check(engine)


def test_stop_refuses_and_names_both_counts(open_tiny, model, rng):
    engine = open_tiny(model, n_ctx=512)
    with pytest.raises(ContextFullError, match=r"513 tokens.* 512\b"):
        engine.generate(random_ids(rng, 513))
    assert collect(engine.generate(random_ids(rng, 510))).reason == "context"


def test_nothing_is_dropped_while_all_fits(evicting, open_tiny, model, rng):
    ids = random_ids(rng, 450)
    both = [collect(e.generate(ids, sampler=WARM, max_tokens=62)) for e in (evicting(model, 512), open_tiny(model, n_ctx=512))]
    assert both[0].ids == both[1].ids and both[0].prefills == both[1].prefills and not both[0].evictions


def test_no_rewind_into_what_was_dropped(evicting, model, rng):
    engine = evicting(model, 512)
    ids = random_ids(rng, 1200)
    collect(engine.generate(ids, max_tokens=4))
    # a short way back is a rewind
    near = ids[:1190] + [7] * 3
    warm = collect(engine.generate(near, max_tokens=4))
    assert not warm.notices and warm.stop.stats.prefilled_tokens in (3, 4)
    check(engine)
    # a long one is not: what came just before is gone, or little is left of it
    oldest = engine.sequence.tables()[0].base[1]
    assert oldest > 800
    for n in (oldest + 10, oldest, 300, 129):
        other = ids[:n] + random_ids(rng, 40)
        again = watched(engine, engine.generate(other, max_tokens=6))
        fresh = collect(evicting(model, 512).generate(other, max_tokens=6))
        assert len(again.notices) == 1 and "dropped" in again.notices[0].text and again.ids == fresh.ids
        assert again.stop.stats.cached_tokens == 0 and again.evictions == fresh.evictions
        collect(engine.generate(ids, max_tokens=4))
    # the kept head is there
    head = collect(engine.generate(ids[:100] + [9] * 20, max_tokens=4))
    assert not head.notices and head.stop.stats.cached_tokens == 100
    check(engine)


def test_an_interrupt_past_the_context_loses_nothing(evicting, model, rng):
    ids = random_ids(rng, 700)
    unbroken = collect(evicting(model, 512, prefill_chunk=64).generate(ids, sampler=WARM, max_tokens=300))
    engine = evicting(model, 512, prefill_chunk=64)
    said: list[int] = []
    evictions: list[Eviction] = []
    while len(said) < 300:
        events = engine.generate(ids + said, sampler=WARM, max_tokens=300 - len(said))
        left = rng.randrange(1, 60)
        def cut():
            for n, event in enumerate(events):
                check(engine)
                yield event
                if n == left:
                    engine.interrupt()
        part = collect(cut())
        assert not part.notices
        said += part.ids
        evictions += part.evictions
    if engine.executor.name == "reference":
        # an answer that goes on is read as prompt rows, which the native executor rounds in its own way
        assert said == unbroken.ids
    assert sum(e.tokens for e in evictions) == len(engine.tokens) - engine.held


def test_the_trained_length_is_not_passed(evicting, model, rng):
    """What is held becomes a shorter text of its own, and is what a new prompt of those tokens would be."""
    engine = evicting(model, 512, limit=1024)
    ids = random_ids(rng, 300)
    positions = []
    step = engine.executor.step
    engine.executor.step = lambda batch: (positions.extend(batch.positions), step(batch))[1]
    answer = watched(engine, engine.generate(ids, sampler=WARM, max_tokens=1500))
    assert len(answer.ids) == 1500 and max(positions) == 1023
    rereads = [n for n in answer.notices if "1024" in n.text]
    assert len(rereads) == len(answer.notices) >= 2
    assert answer.stop.stats.reread_tokens > 400 * len(rereads)
    assert answer.stop.stats.evicted_tokens == len(engine.tokens) - engine.held
    assert engine.tokens == ids + answer.ids[:-1] and engine.tokens[:PAGE] == ids[:PAGE]


def test_after_a_reread_the_answer_is_that_of_the_shorter_text(evicting, model, rng):
    engine = evicting(model, 512, limit=512)
    ids = random_ids(rng, 500)
    answer = watched(engine, engine.generate(ids, max_tokens=40))
    assert [e.reason for e in answer.evictions] == ["n_positions"] and len(answer.notices) == 1
    cut = answer.evictions[0]
    assert cut.positions == ((128, 512 - (512 - 128) // 2),) and cut.tokens == 192
    said = 12                                            # 512 positions were used, the 13th drawn token came next
    text = ids + answer.ids[:said]
    shorter = text[:128] + text[128 + cut.tokens:]
    fresh = collect(evicting(model, 512).generate(shorter + answer.ids[said:said + 1], max_tokens=20))
    if engine.executor.name == "reference":
        assert fresh.ids == answer.ids[said + 1 : said + 21]
    # the conversation goes on without being read again, and can be taken back a little
    more = collect(engine.generate(ids + answer.ids[:-5] + [1, 2, 3], max_tokens=3))
    assert not more.notices and more.stop.stats.prefilled_tokens <= 4
    check(engine)
    back = collect(engine.generate(ids[:300] + [1, 2, 3], max_tokens=3))
    assert len(back.notices) == 1 and back.ids == collect(evicting(model, 512).generate(ids[:300] + [1, 2, 3], max_tokens=3)).ids


def test_an_interrupt_amid_a_reread(evicting, model, rng):
    engine = evicting(model, 512, limit=512, prefill_chunk=64)
    ids = random_ids(rng, 510)
    events = engine.generate(ids, sampler=WARM, max_tokens=30)
    seen = []
    for event in events:
        seen.append(event)
        if any("trained" in getattr(e, "text", "") for e in seen):
            engine.interrupt()
    assert seen[-1].reason == "interrupt"
    said = [e.id for e in seen if type(e).__name__ == "Token"]
    again = watched(engine, engine.generate(ids + said, sampler=WARM, max_tokens=10))
    assert len(again.notices) >= 1 and again.ids == collect(
        evicting(model, 512, limit=512, prefill_chunk=64).generate(ids + said, sampler=WARM, max_tokens=10)).ids


@pytest.mark.parametrize("n_ctx", [512, 2048])
def test_a_sliding_model_goes_on(evicting, sliding_model, rng, n_ctx):
    """Nothing of it is dropped that it would see."""
    engine = evicting(sliding_model, n_ctx, prefill_chunk=64)
    ids = random_ids(rng, 3000)
    answer = collect(engine.generate(ids, max_tokens=200))
    assert len(answer.ids) == 200 and not answer.evictions
    wide = collect(evicting(sliding_model, 4096, prefill_chunk=64).generate(ids, max_tokens=200))
    assert wide.ids == answer.ids


def test_an_error_past_the_context_leaves_the_cache_in_order(evicting, tmp_path, seed, rng):
    from safetensors.numpy import load_file, save_file

    folder = random_model(tmp_path / "nan", seed)
    tensors = load_file(folder / "model.safetensors")
    embed = tensors["model.embed_tokens.weight"].copy()
    embed[200] = np.nan
    save_file(tensors | {"model.embed_tokens.weight": embed}, folder / "model.safetensors")
    good = [rng.randrange(200) for _ in range(700)]
    expected = collect(evicting(folder, 512, prefill_chunk=64).generate(good, max_tokens=4)).ids
    engine = evicting(folder, 512, prefill_chunk=64)
    with pytest.raises(NumericError):
        collect(engine.generate([*good, 7, 200], max_tokens=4))
    check(engine)
    assert collect(engine.generate(good, max_tokens=4)).ids == expected
    check(engine)


def test_a_chat_ten_times_as_long_as_the_context(evicting, model, rng):
    """It goes on, keeps its system prompt, prefills each turn once and takes no memory but that of the start."""
    system = "be brief " * 20
    engine = evicting(model, 512)
    keep = head_tokens(engine.text, system)
    assert engine.text.encode_chat([{"role": "system", "content": system}, {"role": "user", "content": "x"}])[:keep][-4:] == \
        engine.text.encode("user\n", bos=False)[-4:] or keep > 180
    engine.evict("window", keep)
    conversation = Conversation(engine.text, system)
    prompt: list[int] = []
    evicted = turns = 0
    while len(engine.tokens) < 10 * 512:
        known = len(engine.tokens)
        prompt = conversation.ask("word " * rng.randrange(1, 60))
        answer = collect(engine.generate(prompt, sampler=WARM, max_tokens=rng.randrange(1, 50)))
        check(engine)
        assert answer.reason == "length" and not answer.notices
        assert answer.stop.stats.prefilled_tokens == len(prompt) - known
        conversation.answered(answer.text, answer.ids)
        evicted += answer.stop.stats.evicted_tokens
        turns += 1
        assert all(engine.sequence.holds(p) for p in range(keep))
    assert evicted == len(engine.tokens) - engine.held and engine.tokens == prompt + answer.ids[:-1]
    assert engine.executor.appended == len(engine.spec.layers) * len(engine.tokens)
    conversation.clear()
    after = collect(engine.generate(conversation.ask("hello"), sampler=WARM, max_tokens=3))
    assert after.stop.stats.cached_tokens >= keep - 1 and not after.notices, "/clear goes back to the system prompt"
    check(engine)


def test_turns_go_as_a_whole(evicting, model, rng):
    engine = evicting(model, 2048)
    ids: list[int] = []
    begins = []
    for _ in range(6):
        begins.append(len(engine.tokens))
        ids += random_ids(rng, 300)
        answer = collect(engine.generate(ids, max_tokens=50))
        ids += answer.ids
    assert not answer.evictions or answer.evictions[0].positions[0][1] >= begins[1] // PAGE * PAGE
    while not answer.evictions:
        ids += random_ids(rng, 100)
        answer = collect(engine.generate(ids, max_tokens=50))
        ids += answer.ids
    first = answer.evictions[0]
    assert first.positions == ((PAGE, begins[1] // PAGE * PAGE),)


def test_keep_that_leaves_no_room(open_tiny, model):
    engine = open_tiny(model, n_ctx=512)
    with pytest.raises(UsageError, match="--keep 300 .*at most 256"):
        engine.evict("window", 300)
    assert not engine.sequence.evicts


def test_the_head_of_every_conversation(open_tiny, tmp_path):
    engine = open_tiny(scripted_model(tmp_path / "m", [b"ok"]))
    for system in ("be brief", None):
        messages = [{"role": "system", "content": system}] if system else []
        whole = engine.text.encode_chat([*messages, {"role": "user", "content": "Z"}])
        assert whole[head_tokens(engine.text, system)] == ord("Z")

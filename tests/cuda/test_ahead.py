"""Steps that the CUDA executor starts before their token is asked for: they change no answer and no byte of the cache."""

import numpy as np
import pytest

from kvrun.backends.batch import Batch, Sampler
from kvrun.engine.events import Token

from .answers import answer, cached, same, tokens


@pytest.fixture
def pair(open_tiny):
    """pair(kv, ...) -> two engines over the same model, of which the second never runs ahead."""
    def open_(kv="f32", **settings):
        engines = [open_tiny("cuda", kv, **settings) for _ in range(2)]
        engines[1].executor.runs_ahead = False
        return engines

    return open_


@pytest.mark.parametrize("kv,window", [("q8", 0), ("q4", 0), ("q4", 50), ("q8/q4", 0)])
def test_answers_and_cache_are_the_same(pair, rng, kv, window):
    """Answers that go on, break off, are taken back and begin anew, over page borders."""
    engines, history = pair(kv, window=window), []
    for ids, n in ((tokens(rng, 116), 20), (tokens(rng, 10), 3), (tokens(rng, 5), 5)):
        said = [answer(engine, history + ids, n) for engine in engines]
        assert said[0] == said[1] and len(said[0]) == n
        assert engines[0].executor.appended == engines[1].executor.appended
        assert same(*map(cached, engines))
        history = engines[0].tokens[: len(engines[0].tokens) - 2]     # the next prompt takes the last two back


@pytest.mark.parametrize("n_ctx", [256, 270])
def test_a_full_context_ends_the_same(pair, rng, n_ctx):
    """At the end of a page, and where the step ahead goes past it."""
    engines, ids = pair("q4", n_ctx=n_ctx), tokens(rng, 240)
    said = [answer(engine, ids, 100) for engine in engines]
    assert said[0] == said[1] and len(said[0]) == n_ctx - 240 + 1
    assert same(*map(cached, engines))


@pytest.mark.parametrize("window", [0, 200])
def test_pages_that_are_given_up(pair, rng, window):
    engines, ids = pair("q4", n_ctx=384, window=window), tokens(rng, 370)
    for engine in engines:
        engine.evict("window")
    said = [answer(engine, ids, 24) for engine in engines]
    assert said[0] == said[1] and engines[0].sequence.length > 384
    assert same(*map(cached, engines))


def test_logits_are_those_of_the_step_that_returned(pair, rng):
    engine, plain = pair()
    ids = tokens(rng, 10)
    for one, other in zip(engine.generate(ids, max_tokens=8, logprobs=3), plain.generate(ids, max_tokens=8, logprobs=3), strict=True):
        assert type(one) is type(other)
        if isinstance(one, Token):
            assert one == other
            assert np.array_equal(engine.executor.logits(), plain.executor.logits())
    assert engine.executor._ahead is not None


@pytest.mark.parametrize("kv", ["f32", "q4", "q4/q8", "q8/q4"])
def test_another_row_than_the_one_that_ran_ahead(pair, rng, kv):
    """The step ahead is dropped where the token, the sampler, or what is wanted is another, in the page's last slot too; or wanted, and
    none follows it. Pages that are quantized whole take no row back."""
    engines = engine, plain = pair(kv, layers=2)

    def step(*ids, sampler=Sampler(), back=0, out=True, prefill=False):
        results = []
        for e in engines:
            assert e.sequence.truncate(e.sequence.length - back)
            start = e.sequence.length
            e.sequence.extend(len(ids))
            results.append(e.executor.step(Batch(tokens=list(ids), positions=list(range(start, start + len(ids))), prefill=prefill,
                                                 tables=[[t] for t in e.sequence.tables()], out_rows=[len(ids) - 1] if out else [], sampler=sampler)))
            results.append(e.executor.logits())
        assert results[0] == results[2] and np.array_equal(results[1], results[3])
        assert same(cached(engine), cached(plain)) and engine.executor.appended == plain.executor.appended
        return results[0]

    back = 0 if "q4" in kv else 1
    (drawn,) = step(5)
    (drawn,) = step(drawn)
    step((drawn + 1) % 256)
    (drawn,) = step(9, back=back)
    step(drawn, sampler=Sampler(seed=3, temperature=5.0))
    step(7, sampler=None)
    step(7, out=False)
    (drawn,) = step(7, back=2 * back)
    step(drawn, back=back)
    (drawn,) = step(*tokens(rng, 6), prefill=True)
    (drawn,) = step(drawn)
    engine.executor.runs_ahead = False                            # the step that ran ahead is wanted, and is the last of its kind
    (drawn,) = step(drawn)
    (drawn,) = step(drawn)
    engine.executor.runs_ahead = True
    while engine.sequence.length < 126:
        (drawn,) = step(*tokens(rng, min(16, 126 - engine.sequence.length)), prefill=True)
    (drawn,) = step(drawn)
    assert engine.executor._ahead is not None                     # of slot 127
    (drawn,) = step((drawn + 1) % 256)
    for other in (0, 0, 1, 0):
        (drawn,) = step((drawn + other) % 256)


@pytest.mark.parametrize("kv", ["f32", "q4"])
def test_a_step_that_ctrl_c_leaves_is_waited_for(open_tiny, rng, monkeypatch, kv):
    """Its copies may still read what the next step writes. That one gives what it gives without."""
    engine, ids = open_tiny("cuda", kv), tokens(rng, 10)
    wanted = answer(engine, ids, 4)
    device, wait, waited = engine.executor._device, engine.executor._device.wait, []

    def interrupted(mark):
        waited.append(mark)
        if len(waited) == 3:
            raise KeyboardInterrupt
        wait(mark)

    monkeypatch.setattr(device, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer(engine, tokens(rng, 6), 8)
    assert len(waited) == 4 and engine.executor._ahead is None
    assert answer(engine, ids, 4) == wanted

"""Log-probabilities of generated and of prompt tokens."""

import math

import numpy as np
import pytest

from kvrun.backends.batch import Sampler
from kvrun.engine.logprobs import token_logprob
from kvrun.errors import NumericError

from .running import collect, random_ids


def test_against_the_definition(rng):
    logits = np.array([rng.gauss(0, 10) for _ in range(500)], dtype=np.float32)
    p = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    found = token_logprob(logits, 7, 123, 5)
    assert found.index == 7 and found.id == 123 and math.isclose(found.logprob, math.log(p[123]), rel_tol=1e-9)
    best = np.argsort(-p)[:5]
    assert [i for i, _ in found.top] == list(best)
    assert np.allclose([lp for _, lp in found.top], np.log(p[best]))


def test_ties_go_to_the_lower_id_and_large_logits_do_not_overflow():
    found = token_logprob(np.array([1e4, 3e4, 3e4, 3e4, -1e4], dtype=np.float32), 0, 0, 2)
    assert [i for i, _ in found.top] == [1, 2]
    assert math.isclose(found.top[0][1], -math.log(3)) and found.logprob < -1e4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_an_error(bad):
    with pytest.raises(NumericError):
        token_logprob(np.array([0, bad, 1], dtype=np.float32), 0, 0, 1)


def test_generated_tokens(open_tiny, model, rng):
    answer = collect(open_tiny(model).generate(random_ids(rng, 20), max_tokens=16, logprobs=3))
    for index, token in enumerate(answer.tokens):
        record = token.logprob
        assert (record.index, record.id, len(record.top)) == (index, token.id, 3)
        assert record.top[0] == (token.id, record.logprob), "greedy takes the likeliest"
        assert record.top[0][1] >= record.top[1][1] >= record.top[2][1]


def test_echo_does_not_depend_on_how_the_prompt_is_cut(open_tiny, model, rng):
    ids = random_ids(rng, 70)
    runs = [collect(open_tiny(model, max_out=m, prefill_chunk=c).generate(ids, max_tokens=2, logprobs=4, echo=True)).stop.prompt_logprobs
            for m, c in ((1, 64), (16, 64), (64, 16), (100, 100))]
    for run in runs:
        assert [p.index for p in run] == list(range(70)) and [p.id for p in run] == ids
        assert run[0].logprob is None and not run[0].top
        for a, b in zip(run[1:], runs[0][1:], strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4) and [i for i, _ in a.top] == [i for i, _ in b.top]


def test_an_answer_scores_the_same_as_a_prompt(open_tiny, model, rng, device):
    engine = open_tiny(model, max_out=32)
    ids = random_ids(rng, 30)
    answer = collect(engine.generate(ids, sampler=Sampler(seed=5, temperature=1.0, top_k=50), max_tokens=20, logprobs=1))
    before = engine.executor.appended
    scored = collect(engine.generate(ids + answer.ids, max_tokens=0, logprobs=1, echo=True))
    assert scored.reason == "length" and not scored.ids
    # the native executor rounds prompt rows and decode rows differently
    tolerance = 1e-3 if device == "reference" else 0.3
    for token, place in zip(answer.tokens, scored.stop.prompt_logprobs[30:], strict=True):
        assert token.id == place.id and token.logprob.logprob == pytest.approx(place.logprob, abs=tolerance)
    # every row's logits are wanted, so every row is computed, once
    assert engine.executor.appended - before == len(engine.spec.layers) * 50 and scored.stop.stats.cached_tokens == 0

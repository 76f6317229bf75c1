"""sample against the rules of kv_sampler, written down in float64."""

import numpy as np
import pytest

from kvrun.backends.native import ffi, lib

from .plans import floats, pointer

MASK = 2**64 - 1


def mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


def kept(logits, *, temperature, top_k, top_p, min_p, repeat_penalty, recent):
    """Probabilities of the tokens that may be drawn, zero elsewhere."""
    x = logits.astype(np.float64)
    for i in set(recent):
        x[i] = x[i] * repeat_penalty if x[i] < 0 else x[i] / repeat_penalty
    order = np.lexsort((np.arange(len(x)), -x))
    if temperature <= 0:
        p = np.zeros(len(x))
        p[order[0]] = 1
        return p
    if 0 < top_k < len(x):
        x[x < x[order[top_k - 1]]] = -np.inf
    p = np.exp((x - x.max()) / temperature)
    p /= p.sum()
    if top_p < 1:
        last = int(np.searchsorted(np.cumsum(p[order]), top_p))
        p[order[last + 1 :]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def sampler(draws):
    array = ffi.new("kv_sampler[]", len(draws))
    keep = []
    for entry, draw in zip(array, draws, strict=True):
        keep.append(ffi.new("int32_t[]", list(draw["recent"])))
        entry.recent, entry.n_recent, entry.seed = keep[-1], len(draw["recent"]), draw["seed"]
        for name in ("temperature", "top_p", "min_p", "repeat_penalty", "top_k"):
            setattr(entry, name, draw[name])
    return array, keep


OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "recent": (), "seed": 0}


def draw(machine, logits, draws, positions=None, status=lib.KV_OK):
    """One token a row of logits, settings draws[row]."""
    before = logits.copy()
    array, keep = sampler(draws)
    rows = len(draws)
    positions = positions if positions is not None else list(range(rows))
    tokens = machine.run([("sample", {"logits": pointer(logits), "vocab": logits.shape[1]})], pos=positions, out_row=range(rows),
                         sampler=array, status=status)
    assert np.array_equal(logits, before, equal_nan=True)
    return tokens


def check(machine, logits, settings, rng):
    """The drawn token is the one whose share of the kept probability holds u, as far as float32 can tell."""
    seed, position = int(rng.integers(2**63)), int(rng.integers(2**20))
    settings = OFF | settings | {"seed": seed}
    token = draw(machine, logits[None].copy(), [settings], [position])[0]
    settings = {k: v for k, v in settings.items() if k != "seed"}
    u = (mix(seed ^ mix(position)) >> 40) * 2.0**-24
    for loose in (0, -1, 1):                                     # the cuts of top-p and min-p may fall between two roundings
        p = kept(logits, **settings | {"top_p": settings["top_p"] + loose * 3e-6, "min_p": settings["min_p"] * (1 + loose * 3e-6)})
        cdf = np.cumsum(p)
        if p[token] > 0 and cdf[token] - p[token] - 3e-6 <= u <= cdf[token] + 3e-6:
            return token
    raise AssertionError(f"token {token} for {settings}, seed {seed}, position {position}")


SETTINGS = [
    {}, {"temperature": 0.7}, {"temperature": 0.0}, {"temperature": -1.0}, {"top_k": 1}, {"top_k": 50}, {"top_k": 1000}, {"top_k": 10**9},
    {"top_p": 0.9}, {"top_p": 0.01}, {"top_p": 0.0}, {"top_p": 0.999999}, {"min_p": 0.05}, {"min_p": 1.0}, {"min_p": 1e-12},
    {"top_k": 50, "top_p": 0.9}, {"top_k": 50, "top_p": 0.9, "min_p": 0.1, "temperature": 1.3}, {"top_p": 0.8, "min_p": 0.02},
    {"temperature": 10.0, "top_p": 0.95}, {"temperature": 1e-3}, {"temperature": 1e-37}, {"temperature": 1e30, "top_k": 3},
]


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 1000, 49152])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws(machine, rng, vocab, settings):
    for scale in (1, 4, 12):
        check(machine, floats(rng, vocab) * scale, settings, rng)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_repeat_penalty(machine, rng, settings):
    logits = floats(rng, 3000) * 4
    top = np.argsort(-logits)[:40]
    recent = [*rng.choice(top, 60), *rng.integers(0, 3000, 20), int(np.argmin(logits))]
    for penalty in (1.3, 0.5, 5.0):
        check(machine, logits, settings | {"repeat_penalty": penalty, "recent": tuple(int(i) for i in recent)}, rng)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_ties(machine, rng, settings):
    check(machine, rng.integers(0, 4, 500).astype(np.float32), settings, rng)
    check(machine, np.zeros(700, np.float32), settings, rng)


def test_greedy_takes_the_lowest_id_among_equals(machine):
    logits = np.full((1, 1000), -3, np.float32)
    logits[0, [130, 131, 900]] = 2.5
    assert draw(machine, logits, [OFF | {"temperature": 0.0}]) == [130]
    assert draw(machine, logits, [OFF | {"temperature": 0.0, "repeat_penalty": 1.1, "recent": (130,)}]) == [131]


def test_ties_at_the_edge_of_top_p_go_to_the_lower_id(machine):
    logits = np.zeros((200, 100), np.float32)                    # each token has 1/100: the first 25 reach a quarter
    tokens = draw(machine, logits, [OFF | {"top_p": 0.2499, "seed": i} for i in range(200)])
    assert max(tokens) <= 24 and len(set(tokens)) > 15


def test_masked_tokens_are_never_drawn(machine, rng):
    logits = np.full((300, 500), -np.inf, np.float32)
    logits[:, [7, 400]] = 1
    for settings in ({}, {"top_k": 50}, {"top_p": 0.99}, {"min_p": 0.01}, {"temperature": 100.0}):
        tokens = draw(machine, logits, [OFF | settings | {"seed": i} for i in range(300)])
        assert set(tokens) == {7, 400}


def test_frequencies(machine, rng):
    p = np.array([0.5, 0.25, 0.125, 0.125])
    logits = np.tile(np.log(p).astype(np.float32), (4000, 1))
    tokens = draw(machine, logits, [OFF | {"seed": int(rng.integers(2**63))} for _ in range(4000)])
    share = np.bincount(tokens, minlength=4) / 4000
    assert (np.abs(share - p) < 6 * np.sqrt(p * (1 - p) / 4000)).all()


@pytest.mark.parametrize("where", [0, 63, 64, 998])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 5}], ids=str)
def test_logits_that_are_not_finite(machine, rng, where, bad, settings):
    logits = floats(rng, 3, 999)
    logits[1, where] = bad
    tokens = draw(machine, logits, [OFF | settings] * 3, status=lib.KV_NOT_FINITE)
    assert tokens[1] == -1 and min(tokens[0], tokens[2]) >= 0


def test_all_masked_is_not_finite(machine):
    draw(machine, np.full((1, 100), -np.inf, np.float32), [OFF], status=lib.KV_NOT_FINITE)


def test_the_same_seed_and_position_give_the_same_token(machine, rng):
    logits = np.tile(floats(rng, 5000), (64, 1))
    draws = [OFF | {"seed": 5, "top_p": 0.95}] * 64
    first = draw(machine, logits, draws)
    assert first == draw(machine, logits, draws) and len(set(first)) > 10
    alone = [draw(machine, logits[:1].copy(), draws[:1], [position])[0] for position in range(64)]
    assert alone == first

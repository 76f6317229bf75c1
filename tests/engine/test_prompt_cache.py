"""The prompt cache: the same answer with it and without it, and nothing computed twice."""

import json
import subprocess
import sys

import pytest

from kvrun.backends.batch import Sampler
from kvrun.cache.prompt_cache import PromptCache
from kvrun.engine.saved import pages_identity
from kvrun.hub import resolve

from .conftest import _devices
from .running import collect, random_ids

WARM = Sampler(seed=5, temperature=1.0, top_k=50)


@pytest.fixture(scope="module")
def device():
    """Pages lie in the same way for every executor: one will do."""
    return _devices()[-1]


@pytest.fixture
def run(open_tiny, tmp_path):
    """run(folder, ids, cached=True, limit=..., **settings) -> (tokens that were on disk, Answer), as a new process would."""
    def run_(folder, ids, *, cached=True, limit=1 << 30, n=150, **settings):
        engine = open_tiny(folder, **settings)
        cache = PromptCache(pages_identity(resolve(str(folder)), engine), engine, root=tmp_path / "prompts", limit=limit)
        found = cache.load(ids) if cached else 0
        events = []
        for event in engine.generate(ids, sampler=WARM, max_tokens=n):
            events.append(event)
            if cached and type(event).__name__ == "Token" and sum(type(e).__name__ == "Token" for e in events) == 1:
                cache.keep()
        if cached:
            cache.save()
        return found, collect(events)

    return run_


@pytest.mark.parametrize("kv", ["f32", "f16", "q8", "q4", "q8/q4"])
@pytest.mark.parametrize("folder", ["model", "sliding_model"])
def test_the_same_answer_cold_and_warm(run, request, rng, kv, folder):
    path, book = request.getfixturevalue(folder), random_ids(rng, 550)
    questions = [random_ids(rng, n) for n in (20, 90)]
    cold = [run(path, book + q, cached=False, kv=kv)[1].ids for q in questions]
    found, first = run(path, book + questions[0], kv=kv)
    assert (found, first.ids) == (0, cold[0])
    for question, said in zip(questions, cold, strict=True):
        found, answer = run(path, book + question, kv=kv)
        assert found == 512 and answer.ids == said
        assert answer.stop.stats.prefilled_tokens == 550 + len(question) - 512


def test_another_model_or_format_or_text_finds_nothing(run, model, sliding_model, rng):
    ids = random_ids(rng, 400)
    run(model, ids)
    assert run(model, ids)[0] == 384
    assert run(model, ids, kv="f16")[0] == 0 and run(sliding_model, ids)[0] == 0
    assert run(model, [(ids[0] + 1) % 256, *ids[1:]])[0] == 0
    assert run(model, [*ids[:300], (ids[300] + 1) % 256, *ids[301:]])[0] == 256
    assert run(model, ids, n_ctx=512, threads=2)[0] == 384


def test_the_limit_removes_what_was_used_longest_ago(run, model, rng, tmp_path):
    first, second = random_ids(rng, 400), random_ids(rng, 400)
    run(model, first)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    run(model, second, limit=size)
    assert run(model, second, limit=size)[0] == 384 and run(model, first, limit=size)[0] == 0
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= size


def test_a_damaged_page_is_computed_again(run, model, rng, tmp_path):
    ids = random_ids(rng, 400)
    said = run(model, ids)[1].ids
    for harm in (lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:100], lambda data: b"", lambda data: b"\xff" * len(data)):
        victim = rng.choice(sorted(tmp_path.rglob("*.safetensors")))
        victim.write_bytes(harm(victim.read_bytes()))
        assert run(model, ids)[1].ids == said
        assert run(model, ids)[0] == 384


HAMMER = """
import json, sys
from pathlib import Path
from kvrun.backends.batch import Sampler
from kvrun.cache.prompt_cache import PromptCache
from kvrun.engine.events import Token
from kvrun.engine.saved import pages_identity
from kvrun.hub import resolve
from kvrun.runtime import open_engine

folder, root, ids, wanted = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
files = resolve(folder)
for _ in range(6):
    engine = open_engine(files, n_ctx=1024, kv="f16", threads=1)
    cache = PromptCache(pages_identity(files, engine), engine, root=root, limit=200_000)  # less than one prompt takes
    cache.load(ids)
    answer = engine.generate(ids, sampler=Sampler(seed=5, temperature=1.0, top_k=50), max_tokens=3)
    said = [event.id for event in answer if isinstance(event, Token)]
    cache.keep()
    cache.save()
    engine.close()
    assert said == wanted
"""


def test_processes_do_not_disturb_one_another(run, model, rng, tmp_path):
    """Some write what others remove."""
    ids = random_ids(rng, 600)
    wanted = run(model, ids, cached=False, kv="f16", n=3)[1].ids
    command = [sys.executable, "-c", HAMMER, str(model), str(tmp_path / "prompts"), json.dumps(ids), json.dumps(wanted)]
    others = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [(process.communicate(timeout=120)[1], process.returncode) for process in others] == [("", 0)] * 3

"""The cpu executor against the reference on real models and real text, and what it promises about work and memory."""

import gc
from pathlib import Path

import numpy as np
import pytest

from kvrun.backends.batch import Sampler
from kvrun.engine.events import Stop, Token
from kvrun.runtime import open_engine

from .running import kl_divergence, logits_of

PROSE = (Path(__file__).parents[1] / "data" / "alice.txt").read_text(encoding="utf-8")

PROMPTS = [
    "What is the capital of France?", "Write a haiku about the sea.", "Explain photosynthesis in one sentence.",
    "List three prime numbers.", "Who wrote Hamlet?", "Translate 'good morning' into Spanish.",
    "What is 12 times 7?", "Name a planet with rings.", "Give me a recipe for pancakes.", "Why is the sky blue?",
    "Tell me a short story about a cat.", "What does HTTP stand for?", "Describe a sunset.",
    "How do I boil an egg?", "What is the largest ocean?", "Write a Python function that adds two numbers.",
    "Summarize the plot of Romeo and Juliet.", "What is a black hole?", "Give an antonym of 'cold'.",
    "How many days are in a leap year?",
]


def rss_kib() -> int:
    """Resident memory of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def greedy(engine, ids: list[int], n: int) -> list[int]:
    events = engine.generate(ids, sampler=Sampler(), max_tokens=n, stop=[])
    return [e.id for e in events if isinstance(e, Token)]


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def engines(request):
    files = request.getfixturevalue(request.param)
    opened = [open_engine(files, device=d, n_ctx=1024, kv=kv, max_out=64, prefill_chunk=256)
              for d, kv in (("reference", "f32"), ("cpu", "f16"))]
    yield opened
    for engine in opened:
        engine.close()


def test_kl_divergence_from_the_reference(engines) -> None:
    """Prompt rows and decode rows, past Gemma's window of 512."""
    reference, cpu = engines
    ids = cpu.text.encode(PROSE)[:700]
    expected = logits_of(reference, ids, chunk=64)
    for chunk, prefill, n in ((64, True, 700), (1, False, 160)):
        actual = logits_of(cpu, ids[:n], chunk=chunk, prefill=prefill)
        assert np.isfinite(actual).all()
        kl = kl_divergence(expected[:n], actual)
        assert kl.mean() <= 1e-3, f"mean KL {kl.mean():.2e} nats, prefill={prefill}"


def test_rows_do_not_depend_on_the_chunk(engines) -> None:
    _, cpu = engines
    ids = cpu.text.encode(PROSE)[:300]
    whole = logits_of(cpu, ids, chunk=64)
    for chunk in (1, 17):
        assert np.array_equal(whole[:60], logits_of(cpu, ids[:60], chunk=chunk))
    assert np.array_equal(whole, logits_of(cpu, ids, chunk=50))


def test_greedy_answers_agree_with_the_reference(engines) -> None:
    """An answer is the reference's own greedy answer when each of its tokens is the likeliest after those before it."""
    reference, cpu = engines
    same = 0
    for prompt in PROMPTS:
        ids = cpu.text.encode_chat([{"role": "user", "content": prompt}]) if cpu.text.has_template else cpu.text.encode(prompt)
        answer = greedy(cpu, ids, 64)
        assert answer
        logits = logits_of(reference, ids + answer[:-1], chunk=64)
        same += answer == logits[len(ids) - 1 :].argmax(axis=-1).tolist()
    assert same >= 18, f"{same} of {len(PROMPTS)} greedy answers equal"


def test_key_and_value_are_computed_once_and_memory_stands_still(smollm2) -> None:
    engine = open_engine(smollm2, device="cpu", n_ctx=2304)
    layers = len(engine.spec.layers)
    ids = engine.text.encode(PROSE)[:100]
    sampler = Sampler(seed=1, temperature=1.0)
    tokens = 0
    before = None
    for event in engine.generate(ids, sampler=sampler, max_tokens=2100, stop=[]):
        if isinstance(event, Token):
            tokens += 1
            if tokens == 50:
                before = rss_kib()
            if tokens == 500:
                # The newest token has been drawn but not yet run.
                assert engine.executor.appended == layers * (len(ids) + 499)
    if tokens < 2050:  # the model ended its answer: go on by hand, the memory must stand still all the same
        for step in range(2050 - tokens):
            list(engine.generate(engine.tokens + [ids[step % 100]], sampler=Sampler(), max_tokens=1, stop=[]))
    assert rss_kib() - before < 1024
    engine.close()


def test_closing_gives_all_memory_back(smollm2) -> None:
    def cycle() -> None:
        engine = open_engine(smollm2, device="cpu", n_ctx=4096)
        events = list(engine.generate(engine.text.encode("One two three"), sampler=Sampler(), max_tokens=2, stop=[]))
        assert isinstance(events[-1], Stop)
        engine.close()

    cycle()  # what stays of the first time: libraries, interned tokenizer tables
    gc.collect()
    before = rss_kib()
    for _ in range(3):
        cycle()
        gc.collect()
    # 4096 tokens are 92 MiB of weights and 180 MiB of cache; a leak of either would show. The allowance is malloc's.
    assert rss_kib() - before < 20 * 1024


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_answer(smollm2, threads: int) -> None:
    engine = open_engine(smollm2, device="cpu", n_ctx=512, threads=threads)
    ids = engine.text.encode(PROSE)[:150]
    answer = greedy(engine, ids, 24)
    engine.close()
    alone = open_engine(smollm2, device="cpu", n_ctx=512, threads=2)
    assert answer == greedy(alone, ids, 24)
    alone.close()

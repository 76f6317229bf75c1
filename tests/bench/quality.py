"""The cpu executor against the reference executor on real text: KL divergence, top-1 agreement, perplexity; and greedy answers.

The text should be long English prose, such as a chapter of a novel out of copyright; lists, code and licences are easier to
predict than what people read. The default is the chapter that the tests use. Every position is compared; `decode` runs the text
once more row by row, with the arithmetic of single decode steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import kvrun.hub
import kvrun.runtime
from kvrun.backends.batch import Sampler
from kvrun.engine.events import Token

sys.path.append(str(Path(__file__).parents[1]))
from backends.running import kl_divergence, logits_of  # noqa: E402 - shared with the tests of the executors

PROSE = Path(__file__).parents[1] / "data" / "alice.txt"
QUESTIONS = ("Where does the sun go at night?", "Write two sentences about a river.", "What is the opposite of brave?",
             "Name three animals that can fly.", "How is bread made?", "Who was Napoleon?", "What is 15 plus 27?",
             "Describe the smell of rain.", "Why do leaves turn red?", "Give me a name for a black cat.",
             "What is the boiling point of water?", "Explain gravity to a child.", "Write a rhyme about the moon.",
             "What language is spoken in Brazil?", "How do birds find their way?", "List the seasons of the year.",
             "What does a compass do?", "Tell me about the Great Wall.", "Is a tomato a fruit?", "How old is the Earth?")


def log_likelihood(logits: np.ndarray, ids: list[int]) -> float:
    """Mean log-probability of each id given the ones before it; logits: [len(ids)][vocab]."""
    rows = logits[:-1].astype(np.float64)
    top = rows.max(axis=1)
    norm = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
    return float((rows[np.arange(len(rows)), ids[1:]] - norm).mean())


def compare(want: np.ndarray, got: np.ndarray, ids: list[int]) -> dict[str, float]:
    """Figures of `got` against `want`, both [len(ids)][vocab]."""
    divergence = kl_divergence(want, got)
    return {"mean_kld": float(divergence.mean()), "max_kld": float(divergence.max()),
            "same_top1": float((want.argmax(axis=1) == got.argmax(axis=1)).mean()),
            "perplexity_reference": float(np.exp(-log_likelihood(want, ids))),
            "perplexity_cpu": float(np.exp(-log_likelihood(got, ids)))}


def answers(engine, prompts: list[list[int]], n: int) -> list[list[int]]:
    """Greedy continuations of up to n tokens."""
    return [[e.id for e in engine.generate(ids, sampler=Sampler(), max_tokens=n, stop=[]) if isinstance(e, Token)] for ids in prompts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="(default: %(default)s)")
    parser.add_argument("-f", "--text", type=Path, default=PROSE, help="UTF-8 prose (default: %(default)s)")
    parser.add_argument("-n", "--tokens", type=int, default=2048, help="tokens of it, at most (default: %(default)s)")
    parser.add_argument("--kv", default="f16", help="cache format of the cpu executor; the reference has f32 (default: %(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--no-decode", action="store_true", help="skip the row-by-row run")
    parser.add_argument("--answers", type=int, default=len(QUESTIONS), help="greedy answers to compare (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()

    files = kvrun.hub.resolve(options.model)
    results: dict[str, dict[str, float]] = {}
    chunk = 128                                           # rows of logits that are held at once
    n_ctx = max(options.tokens, 256)
    reference = kvrun.runtime.open_engine(files, device="reference", n_ctx=n_ctx, kv="f32", max_out=chunk, prefill_chunk=chunk)
    cpu = kvrun.runtime.open_engine(files, device="cpu", n_ctx=n_ctx, kv=options.kv, threads=options.threads, max_out=chunk,
                                    prefill_chunk=chunk)
    ids = cpu.text.encode(options.text.read_text(encoding="utf-8"))[: options.tokens]
    want = logits_of(reference, ids, chunk=chunk)
    results["prefill"] = compare(want, logits_of(cpu, ids, chunk=chunk), ids)
    if not options.no_decode:
        results["decode"] = compare(want, logits_of(cpu, ids, chunk=1, prefill=False), ids)
    print(f"{files.name}, cpu ({cpu.executor.isa}, kv {options.kv}) against reference, {len(ids)} tokens of {options.text.name}")
    for name, r in results.items():
        print(f"{name:10} mean KLD {r['mean_kld']:.2e}   max {r['max_kld']:.2e}   same top-1 {r['same_top1']:.2%}   "
              f"perplexity {r['perplexity_cpu']:.4f} / {r['perplexity_reference']:.4f}")
    if options.answers:
        chat = cpu.text.has_template
        prompts = [cpu.text.encode_chat([{"role": "user", "content": q}]) if chat else cpu.text.encode(q) for q in QUESTIONS[: options.answers]]
        for engine in (reference, cpu):
            engine.sequence.clear()                       # logits_of stepped past the engine
            engine.tokens.clear()
        pairs = list(zip(answers(reference, prompts, 64), answers(cpu, prompts, 64), strict=True))
        same = sum(a == b for a, b in pairs)
        print(f"greedy     {same} of {len(pairs)} answers of up to 64 tokens are equal")
        results["greedy"] = {"equal": same, "of": len(pairs)}
    reference.close()
    cpu.close()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

"""What --schema costs a token: answers of equal length, free and constrained, in turn. Of all rounds the lower quartile: what else
runs on the machine only ever adds."""

from __future__ import annotations

import argparse
import json
import statistics

from kvrun.backends.batch import Sampler
from kvrun.engine.events import Stop
from kvrun.hub import resolve
from kvrun.runtime import open_engine
from kvrun.text.grammar import from_schema

PERSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 30}, "city": {"type": "string", "maxLength": 30}, "age": {"type": "integer"},
                                           "kind": {"enum": ["red", "green", "blue"]}},
          "required": ["name", "city", "age", "kind"], "additionalProperties": False}
SCHEMAS = {"objects": {"type": "array", "items": PERSON, "minItems": 1000},
           "digits": {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 3}, "minItems": 1000}}
PROMPT = "Make up a list of people, as JSON."


def milliseconds(engine, ids: list[int], tokens: int, seed: int, constraint=None) -> float:
    """A decoded token's share of the time."""
    for event in engine.generate(ids, sampler=Sampler(seed=seed, temperature=0.7, top_k=40), max_tokens=tokens, constraint=constraint):
        end = event
    assert isinstance(end, Stop) and end.stats.decode_steps == tokens - 1, f"{end.reason} after {end.stats.decode_steps} tokens"
    return 1000 * end.stats.decode_seconds / end.stats.decode_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    for model in options.models:
        engine = open_engine(resolve(model), n_ctx=1024)
        ids = engine.text.encode(PROMPT, bos=True)
        grammars = {name: from_schema(engine.text, json.dumps(schema), name) for name, schema in SCHEMAS.items()}
        engine.text.eos_ids = frozenset()  # a free answer must not end before its time
        rows = {name: [] for name in ("free", *grammars)}
        for round_ in range(options.rounds + 1):
            for name, times in rows.items():
                times.append(milliseconds(engine, ids, options.tokens, round_, grammars[name].begin() if name in grammars else None))
        engine.close()
        usual = {name: statistics.quantiles(times[1:], n=4)[0] for name, times in rows.items()}
        print(f"{model:<14}", *(f"{name} {time:.3f} ms a token ({time / usual['free']:.2f}x)" for name, time in usual.items()), sep="   ")


if __name__ == "__main__":
    main()

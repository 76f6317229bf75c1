"""kvrun against transformers on the same GGUF file, in turn: A B A B ... A figure counts only as a ratio within one run.

transformers turns the weights of the file into --dtype when it loads, so where they are quantized it reads more bytes a token than
kvrun, which keeps them packed. Both decode greedily, one token a step, from a cache that holds the prompt; transformers' is its own
DynamicCache, its attention torch's SDPA. No other work should run on the machine. Needs transformers and gguf (of the test extra) and accelerate.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

from measure import Steps, machine

import kvrun.hub
import kvrun.runtime


class Transformers:
    """Greedy steps of transformers."""

    def __init__(self, path: Path, dtype: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=getattr(torch, dtype)).eval()

    def run(self, ids: list[int], steps: int) -> tuple[float, float]:
        """Seconds to read the prompt, and to decode `steps` tokens behind it."""
        from transformers import DynamicCache

        with self.torch.inference_mode():
            cache = DynamicCache(config=self.model.config)
            started = time.perf_counter()
            token = self._step(self.torch.tensor([ids]), cache)
            read = time.perf_counter() - started
            started = time.perf_counter()
            for _ in range(steps):
                token = self._step(token, cache)
            return read, time.perf_counter() - started

    def _step(self, ids, cache):
        logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)


def run_kvrun(engine, ids: list[int], steps: int) -> tuple[float, float]:
    """The same of kvrun."""
    plain = Steps(engine)
    plain.clear()
    token, read = plain.prefill(ids)
    return read, plain.decode(token, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="alias or .gguf file (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of transformers (default: %(default)s)")
    parser.add_argument("-p", "--prompt", type=int, default=512, help="prompt tokens (default: %(default)s)")
    parser.add_argument("-g", "--gen", type=int, default=32, help="decoded tokens (default: %(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--rounds", type=int, default=5, help="pairs of runs; at least 5 for a figure to count")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()

    files = kvrun.hub.resolve(options.model)
    if files.path.suffix != ".gguf":
        parser.error(f"{files.path} is no .gguf file, the one kind that both read here")
    load = machine()["load"]
    if load > 0.5:
        print(f"the machine is not quiet (load {load:.1f}): these figures will not count", file=sys.stderr)
    engine = kvrun.runtime.open_engine(files, device="cpu", n_ctx=options.prompt + options.gen + 64, kv="f16", threads=options.threads,
                                       max_out=1, prefill_chunk=512)
    other = Transformers(files.path, options.dtype, options.threads)
    ids = random.Random(0).choices(range(engine.spec.vocab_size), k=options.prompt)
    tests = {f"pp{options.prompt}": options.prompt, f"tg{options.gen} @ {options.prompt}": options.gen}
    rates: dict[str, dict[str, list[float]]] = {name: {"kvrun": [], "transformers": []} for name in tests}
    for index in range(options.rounds + 1):
        for who, seconds in (("kvrun", run_kvrun(engine, ids, options.gen)), ("transformers", other.run(ids, options.gen))):
            if index:                                     # the first round warms up
                for (name, tokens), taken in zip(tests.items(), seconds, strict=True):
                    rates[name][who].append(tokens / taken)
        print(f"round {index} of {options.rounds}", file=sys.stderr)
    engine.close()

    rows = [{"test": name, **{who: statistics.median(values) for who, values in of.items()},
             "ratio": statistics.median(a / b for a, b in zip(*of.values(), strict=True))} for name, of in rates.items()]
    print(f"{files.name}, {options.threads} threads, {engine.executor.isa} kernels, cache f16; peer: transformers in {options.dtype}")
    print(f"{machine()['cpu']}; load before {load:.1f}; tokens/s, median of {options.rounds} rounds in turn")
    print(f"{'':14}{'kvrun':>10}{'transformers':>14}{'ratio':>8}")
    for row in rows:
        print(f"{row['test']:14}{row['kvrun']:>10.1f}{row['transformers']:>14.1f}{row['ratio']:>8.2f}")
    if options.json:
        options.json.write_text(json.dumps({"model": files.name, "dtype": options.dtype, "threads": options.threads,
                                            "machine": {**machine(), "load": load}, "rows": rows, "samples": rates}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

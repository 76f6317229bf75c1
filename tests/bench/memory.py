"""Resident memory of an engine: after opening, while it decodes, and after close, against what its parts were said to take.

One engine is opened, used and closed first, so that what stays of imports and allocators is not counted against the second one.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path

from measure import rss_bytes

import kvrun.hub
import kvrun.runtime
from kvrun.backends.batch import Sampler
from kvrun.engine.events import Token

MIB = 2**20


def decode(engine, n: int, every: int) -> list[tuple[int, int]]:
    """Generates n tokens with sampling, new answers until it is enough: (tokens so far, resident bytes) each `every`."""
    done, answer, seen = 0, 0, []
    while done < n:
        ids = engine.text.encode(f"{answer}: Once upon a time")
        for event in engine.generate(ids, sampler=Sampler(seed=answer, temperature=1.0), max_tokens=n - done):
            if isinstance(event, Token):
                done += 1
                if done % every == 0:
                    seen.append((done, rss_bytes()))
        answer += 1
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="(default: %(default)s)")
    parser.add_argument("-n", "--tokens", type=int, default=2000, help="decoded tokens (default: %(default)s)")
    parser.add_argument("--n-ctx", type=int, default=2304)
    parser.add_argument("--kv", default="f16")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()

    files = kvrun.hub.resolve(options.model)

    def opened():
        return kvrun.runtime.open_engine(files, device="cpu", n_ctx=options.n_ctx, kv=options.kv, threads=options.threads)

    first = opened()
    decode(first, 8, 8)
    first.close()
    del first
    gc.collect()
    before = rss_bytes()
    engine = opened()
    decode(engine, 8, 8)
    start = rss_bytes()
    seen = decode(engine, options.tokens, 100)
    end = rss_bytes()
    engine.close()
    del engine
    gc.collect()
    after = rss_bytes()

    print(f"{files.name}, n_ctx {options.n_ctx}, kv {options.kv}")
    print(f"before opening      {before / MIB:9.2f} MiB")
    print(f"opened              {start / MIB:9.2f} MiB")
    for tokens, resident in seen[:: max(1, len(seen) // 5)]:
        print(f"  {tokens:6} tokens     {resident / MIB:9.2f} MiB")
    print(f"growth over {options.tokens} tokens {(end - start) / MIB:6.3f} MiB")
    print(f"after close         {after / MIB:9.2f} MiB ({(after - before) / MIB:+.2f} against before)")
    if options.json:
        options.json.write_text(json.dumps({"before": before, "opened": start, "seen": seen, "end": end, "after": after}), encoding="utf-8")


if __name__ == "__main__":
    main()

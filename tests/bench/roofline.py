"""Where the microseconds of one decoded token go, and what its weights cost over the measured read bandwidth.

The time of an op kind is what passes between the barriers around its ops, so waiting is in it. "step" is what the engine's caller
sees: the foreign call, and Python around it. With --busy, the same beside N processes that do nothing but compute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measure import Steps, decode_bytes, machine, read_bandwidth

import kvrun.hub
import kvrun.runtime

BUSY = "while True:\n    pass"


def one_round(steps: Steps, depth: int, n: int, warm: int) -> dict[str, float]:
    """Microseconds a token: by op kind, "python" for what is around the foreign call, and "step" for all of it."""
    steps.clear()
    token = steps.prefill([1 + i % 1000 for i in range(max(depth, 1))])[0]
    steps.decode(token, warm)
    steps.engine.executor.profile()
    seconds = steps.decode(token, n)
    spent = {kind: value / n * 1e6 for kind, value in steps.engine.executor.profile().items()}
    step = seconds / n * 1e6
    return spent | {"python": step - sum(spent.values()), "step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="(default: %(default)s)")
    parser.add_argument("--kv", default="f16", help="(default: %(default)s)")
    parser.add_argument("--weights", default="auto", help="(default: %(default)s)")
    parser.add_argument("-g", "--gen", type=int, default=64, help="decoded tokens (default: %(default)s)")
    parser.add_argument("-d", "--depth", type=int, default=0, help="cached tokens before decoding (default: %(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="take turns with rounds beside N busy processes")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()

    files = kvrun.hub.resolve(options.model)
    engine = kvrun.runtime.open_engine(files, device="cpu", n_ctx=options.depth + options.gen + 256, kv=options.kv, threads=options.threads,
                                       weights=options.weights)
    steps, quiet, busy, bandwidths = Steps(engine), [], [], []
    warm = 160 if options.busy else 4                     # the executor chooses anew between one thread and all
    for _ in range(options.rounds):
        bandwidths.append(read_bandwidth(options.threads))
        quiet.append(one_round(steps, options.depth, options.gen, warm))
        if options.busy:
            others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(options.busy)]
            try:
                time.sleep(0.5)
                busy.append(one_round(steps, options.depth, options.gen, warm))
            finally:
                for other in others:
                    other.kill()
                    other.wait()
    bandwidth = statistics.median(bandwidths)
    moved = decode_bytes(files, engine.executor.plan, options.depth + options.gen // 2, options.weights)
    median = {kind: statistics.median(r[kind] for r in quiet) for kind in quiet[0]}
    step = median.pop("step")
    print(f"{files.name}, {options.threads} threads, {engine.executor.isa} kernels, depth {options.depth}; {machine()['cpu']}")
    for kind, us in sorted(median.items(), key=lambda item: -item[1]):
        print(f"{kind:10}{us:9.0f} us {us / step:7.1%}")
    print(f"{'step':10}{step:9.0f} us   {1e6 / step:.1f} tokens/s; {moved / 1e6:.1f} MB a token at {bandwidth / 1e9:.1f} GB/s are "
          f"{moved / bandwidth * 1e6:.0f} us: {moved / bandwidth * 1e6 / step:.0%} of bandwidth")
    share = None
    if busy:
        share = statistics.median(a["step"] / b["step"] for a, b in zip(quiet, busy, strict=True))
        print(f"beside {options.busy} busy processes: {1e6 / statistics.median(r['step'] for r in busy):.1f} tokens/s, {share:.0%} of quiet")
    if options.json:
        options.json.write_text(json.dumps({"quiet": quiet, "busy": busy, "bandwidth": bandwidth, "bytes": moved, "share": share}, indent=1))
    engine.close()


if __name__ == "__main__":
    main()

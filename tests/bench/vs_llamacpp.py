"""kvrun against llama.cpp on the same file, in turn: A B A B ... A figure counts only as a ratio within one run.

Prefill ("pp512"): one prompt into an empty cache, logits of its last row. Decode ("tg64 @ d"): greedy single steps after d
cached tokens. kvrun's times include its Python step, page bookkeeping and sampling; llama-bench samples nothing. Both warm up
before every timed part. Both use as many threads as asked, and no other work should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

import peer
from measure import Steps, decode_bytes, machine, read_bandwidth

import kvrun.hub
import kvrun.runtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="alias or .gguf file (default: %(default)s)")
    parser.add_argument("--peer", type=Path, help="a llama-bench binary; else --build is used")
    parser.add_argument("--build", choices=peer.BUILDS, default="avx512",
                        help="which llama.cpp to build, on first use, from its source package (default: %(default)s)")
    parser.add_argument("--peer-model", type=Path, help="the file for llama-bench, when MODEL is a folder or a Hub model")
    parser.add_argument("--peer-args", default="", help='more arguments for llama-bench, such as "-fa on"')
    parser.add_argument("--kv", default="f16", help="kvrun's cache format; llama.cpp's goes into --peer-args (default: %(default)s)")
    parser.add_argument("-p", "--prompt", type=int, default=512, help="prompt tokens (default: %(default)s)")
    parser.add_argument("-g", "--gen", type=int, default=64, help="decoded tokens (default: %(default)s)")
    parser.add_argument("-d", "--depth", type=int, nargs="*", default=[0], help="cached tokens before decoding (default: 0)")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--rounds", type=int, default=5, help="pairs of runs; at least 5 for a figure to count")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()

    binary = options.peer or peer.ensure(options.build)
    build = str(options.peer) if options.peer else f"llama.cpp of {peer.PACKAGE}, {options.build} build"
    files = kvrun.hub.resolve(options.model)
    peer_model = options.peer_model or files.path
    if peer_model.suffix != ".gguf":
        parser.error(f"llama-bench cannot read {peer_model}: name a .gguf file with --peer-model")
    n_ctx = max(options.prompt, *(d + options.gen for d in options.depth)) + 64
    engine = kvrun.runtime.open_engine(files, device="cpu", n_ctx=n_ctx, kv=options.kv, threads=options.threads, max_out=1,
                                       prefill_chunk=512)
    ids = random.Random(0).choices(range(engine.spec.vocab_size), k=max(options.prompt, *options.depth, 1))
    names = ([f"pp{options.prompt}"] if options.prompt else []) + [f"tg{options.gen} @ {d}" for d in options.depth if options.gen]
    rates: dict[str, dict[str, list[float]]] = {name: {"kvrun": [], "llama.cpp": []} for name in names}

    load = machine()["load"]
    if load > 0.5:
        print(f"the machine is not quiet (load {load:.1f}): these figures will not count", file=sys.stderr)
    bandwidths = []
    for index in range(options.rounds):
        bandwidths.append(read_bandwidth(options.threads))
        for who, rate in (("kvrun", run_kvrun), ("llama.cpp", run_peer)):
            for name, value in rate(options, engine, ids, binary, peer_model).items():
                rates[name][who].append(value)
        print(f"round {index + 1} of {options.rounds}", file=sys.stderr)

    bandwidth = statistics.median(bandwidths)
    rows = []
    for name in names:
        ours, theirs = rates[name]["kvrun"], rates[name]["llama.cpp"]
        row = {"test": name, "kvrun": statistics.median(ours), "llama.cpp": statistics.median(theirs),
               "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True))}
        if name.startswith("tg"):
            depth = int(name.split("@")[1])
            row["bytes_per_token"] = decode_bytes(files, engine.executor.plan, depth + options.gen // 2)
            row["share_of_bandwidth"] = row["bytes_per_token"] * row["kvrun"] / bandwidth
        rows.append(row)
    engine.close()

    print(f"{files.name}, {options.threads} threads, {engine.executor.isa} kernels, cache {options.kv}; peer: {build} {options.peer_args}".rstrip())
    print(f"{machine()['cpu']}; load before {load:.1f}; reads {bandwidth / 1e9:.1f} GB/s; tokens/s, median of {options.rounds} rounds in turn")
    print(f"{'':14}{'kvrun':>10}{'llama.cpp':>11}{'ratio':>8}{'of bandwidth':>14}")
    for row in rows:
        share = f"{row['share_of_bandwidth']:>13.0%}" if "share_of_bandwidth" in row else ""
        print(f"{row['test']:14}{row['kvrun']:>10.1f}{row['llama.cpp']:>11.1f}{row['ratio']:>8.2f}{share:>14}")
    if options.json:
        options.json.write_text(json.dumps({"model": files.name, "peer": build, "threads": options.threads,
                                            "machine": {**machine(), "load": load}, "bandwidth": bandwidth, "rows": rows, "samples": rates},
                                           indent=1), encoding="utf-8")


def run_kvrun(options, engine, ids, binary, peer_model) -> dict[str, float]:
    """Tokens per second of every test, once."""
    steps, result = Steps(engine), {}
    if options.prompt:
        for _ in range(2):                                # llama-bench warms up with a prompt of its own, too
            steps.clear()
            seconds = steps.prefill(ids[: options.prompt])[1]
        result[f"pp{options.prompt}"] = options.prompt / seconds
    for depth in options.depth if options.gen else ():
        steps.clear()
        token = steps.prefill(ids[: max(depth, 1)])[0]
        if depth == 0:
            steps.clear()
        steps.decode(token, 1)
        if not engine.sequence.truncate(depth):
            raise SystemExit("a sliding window cannot rewind by one token")
        result[f"tg{options.gen} @ {depth}"] = options.gen / steps.decode(token, options.gen)
    return result


def run_peer(options, engine, ids, binary, peer_model) -> dict[str, float]:
    """The same from llama-bench: one repetition of each test after its own warm-up."""
    result = {}
    common = [str(binary), "-m", str(peer_model), "-t", str(options.threads), "-r", "1", "-o", "json", *options.peer_args.split()]
    calls = [["-p", str(options.prompt), "-n", "0"]] if options.prompt else []
    if options.gen and options.depth:
        calls.append(["-p", "0", "-n", str(options.gen), "-d", ",".join(map(str, options.depth))])
    for call in calls:
        run = subprocess.run([*common, *call], capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"{binary} ended with {run.returncode}: {run.stderr.strip().splitlines()[-1:]}")
        for entry in json.loads(run.stdout):
            name = f"pp{entry['n_prompt']}" if entry["n_prompt"] else f"tg{entry['n_gen']} @ {entry['n_depth']}"
            result[name] = entry["avg_ts"]
    return result


if __name__ == "__main__":
    main()

"""Measures kvrun on a device with random weights of real shapes: decode and prefill by weights, cache format and depth, beside the
device's own copy bandwidth, the matrix library's own rate, torch's attention, and transformers with a static cache. One table, and one
JSON file that is written anew after every row."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from opened import Opened, Track
from shapes import SHAPES, write
from targets import verdicts

from kvrun.backends.cuda import require
from kvrun.cache.planner import attended_bytes, token_bytes

KVS = ("f16", "q8", "q4")
DEPTHS = (0, 2048, 8192, 32768, 65536)


@dataclass(frozen=True)
class Size:
    """How much is measured. cases: shape, weights, caches, depths, what is most worth knowing first."""

    cases: tuple[tuple[str, str, tuple[str, ...], tuple[int, ...]], ...]
    steps: int                    # decode steps of a round
    rounds: int
    chunk: int                    # prompt rows of a step
    copy_bytes: int
    peers: tuple[str, str]        # shapes that other programs are measured on: matrix products and attention, a whole model
    peer_depth: int
    reserve: float                # seconds kept for the peers


SIZES = {
    "cuda": Size((("llama-8b", "bf16", KVS, DEPTHS), ("llama-1b", "bf16", KVS, DEPTHS), ("llama-8b", "q4", KVS, DEPTHS), ("llama-8b", "q8", KVS, DEPTHS),
                  ("llama-8b", "q4s", ("f16",), (0,)), ("qwen3-0.6b", "bf16", KVS, DEPTHS), ("llama-1b", "q4", KVS, DEPTHS), ("llama-1b", "q8", KVS, DEPTHS),
                  ("qwen3-0.6b", "q4", KVS, DEPTHS), ("qwen3-0.6b", "q8", KVS, DEPTHS)), 32, 5, 2048, 1 << 30, ("llama-8b", "llama-1b"), 32768, 60),
    "simt": Size((("tiny", "bf16", KVS, (0, 256)), ("tiny", "q4", ("q8",), (0,)), ("tiny", "q8", ("f16",), (0,)), ("tiny", "q4s", ("f16",), (0,))),
                 2, 2, 128, 1 << 20, ("tiny", "tiny"), 256, 0),
}


class Clock:
    """Times work that the device has finished."""

    def __init__(self, device: str) -> None:
        self.torch = "cuda" if device == "cuda" else "cpu"
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def seconds(self, work: Callable[[], object], rounds: int) -> float:
        """Median of `rounds`, after one that does not count."""
        work()
        taken = []
        for _ in range(rounds):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)


def copy_bandwidth(clock: Clock, n_bytes: int) -> float:
    """Bytes read and written per second by a copy within the device."""
    source = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, device=clock.torch)
    target = torch.empty_like(source)
    return 2 * n_bytes / clock.seconds(lambda: target.copy_(source), 10)


def products_seconds(clock: Clock, name: str, rows: int) -> float:
    """Time of the bare bfloat16 products of `rows` prompt rows through a model of this shape, without its head."""
    c = SHAPES[name]
    hidden, ffn, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    total = 0.0
    for n, k in ((q + 2 * kv, hidden), (hidden, q), (2 * ffn, hidden), (hidden, ffn)):
        x, w = (torch.randn(r, k, dtype=torch.bfloat16, device=clock.torch) for r in (rows, n))
        total += clock.seconds(lambda x=x, w=w: torch.mm(x, w.t()), 5)
    return total * c["num_hidden_layers"]


def sdpa_ms(clock: Clock, name: str, depth: int) -> float:
    """One decode row's attention in all layers, by torch, over dense bfloat16 caches of their own; launched one by one."""
    c = SHAPES[name]
    q = torch.randn(1, c["num_attention_heads"], 1, c["head_dim"], dtype=torch.bfloat16, device=clock.torch)
    caches = [tuple(torch.randn(1, c["num_key_value_heads"], depth, c["head_dim"], dtype=torch.bfloat16, device=clock.torch) for _ in "kv") for _ in range(4)]
    attend = torch.nn.functional.scaled_dot_product_attention
    return 1000 * c["num_hidden_layers"] / 4 * clock.seconds(lambda: [attend(q, k, v, enable_gqa=True) for k, v in caches], 9)


def transformers_ms(clock: Clock, name: str, folder: Path, compiled: bool) -> float:
    """Milliseconds a token of transformers with a static cache, greedy."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(write(name, folder))
    few, many = (4, 12) if clock.torch == "cpu" else (8, 72)
    with torch.device(clock.torch), torch.inference_mode():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        ids = torch.ones(1, 8, dtype=torch.long)
        settings: dict[str, Any] = dict(do_sample=False, cache_implementation="static", disable_compile=not compiled, eos_token_id=None, pad_token_id=0)

        def run(n: int) -> float:
            return clock.seconds(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=n, max_new_tokens=n, **settings), 3)

        return 1000 * (run(many) - run(few)) / (many - few)


def llama_cpp(seconds: float) -> object:
    """What LLAMA_BENCH says of LLAMA_MODEL within so long; None where they were not brought along."""
    program, model = os.environ.get("LLAMA_BENCH"), os.environ.get("LLAMA_MODEL")
    if not program or not model:
        return None
    done = subprocess.run([program, "-m", model, "-ngl", "99", "-p", "2048", "-n", "64", "-d", "0,32768", "-r", "3", "-o", "json"], capture_output=True, text=True,
                          timeout=seconds)
    if done.returncode:
        raise RuntimeError(f"llama-bench ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    return [{k: test.get(k) for k in ("model_type", "model_size", "n_prompt", "n_gen", "n_depth", "avg_ts")} for test in json.loads(done.stdout)]


def rows_of(opened: Opened, name: str, weights: str, kv: str, depths: tuple[int, ...], size: Size, clock: Clock, bandwidth: float,
            deadline: float) -> Iterator[dict]:
    """Rows of the table of one cache format."""
    track = opened.track(kv)
    try:
        track.fill()
        prefill = size.chunk / clock.seconds(lambda: (track.jump(0), track.prefill(size.chunk)), 3)
        for depth in depths:
            if time.monotonic() > deadline:
                return
            ms = decode_ms(track, depth, size)
            mean = depth + 1 + int((size.rounds / 2 + 2) * size.steps)
            layouts = opened.blueprint.layouts(kv, opened.n_ctx)
            moved = opened.blueprint.read_bytes + attended_bytes(opened.plan.groups, layouts, mean) + token_bytes(layouts)
            yield {"shape": name, "weights": weights, "kv": kv, "depth": depth, "ms_per_token": ms, "tokens_per_second": 1000 / ms, "bytes_moved": moved,
                   "share_of_copy": moved / (ms / 1000) / bandwidth, "prefill_tokens_per_second": prefill if depth == depths[0] else None}
    finally:
        track.close()


def decode_ms(track: Track, depth: int, size: Size) -> float:
    """Median over the rounds of a decode step's time behind `depth` tokens."""
    track.jump(depth)
    track.prefill(1)
    taken = []
    for turn in range(2 + size.rounds):         # two that do not count: they capture the step, once for each of its turns
        started = time.perf_counter()
        for _ in range(size.steps):
            track.decode()
        if turn >= 2:
            taken.append(1000 * (time.perf_counter() - started) / size.steps)
    return statistics.median(taken)


def show(row: dict) -> None:
    """One line of the table."""
    prefill = f"{row['prefill_tokens_per_second']:>12.0f}" if row["prefill_tokens_per_second"] else ""
    print(f"{row['shape']:<12}{row['weights']:<6}{row['kv']:<5}{row['depth']:>7}{row['ms_per_token']:>10.3f}{row['tokens_per_second']:>10.1f}"
          f"{100 * row['share_of_copy']:>9.0f} %{prefill}", flush=True)


def is_broken(clock: Clock) -> bool:
    """Whether an error has left the device's context unusable, as a kernel's own errors do, for as long as this process lives."""
    try:
        clock.wait()
    except RuntimeError:
        return True
    return False


def failure(error: BaseException) -> str:
    """One line."""
    return f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]


def main() -> None:
    """See the module."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--device", choices=SIZES, default="cuda")
    arguments.add_argument("--json", type=Path, required=True)
    arguments.add_argument("--steps", type=Path, help="a file of lines that the JSON file repeats")
    arguments.add_argument("--seconds", type=float, default=300.0)
    arguments.add_argument("--after", type=int, default=0, help=argparse.SUPPRESS)      # cases that the JSON file has already
    options = arguments.parse_args()
    deadline = time.monotonic() + options.seconds
    size, clock = SIZES[options.device], Clock(options.device)
    found: dict[str, Any] = {"device": "the emulator: no figure here is a GPU's", "rows": [], "peers": {}, "left_out": []}
    if options.after:
        found = json.loads(options.json.read_text(encoding="utf-8"))
    if options.device == "cuda":
        device = require().devices[0]
        found |= {"device": device.name, "arch": device.arch, "memory_bytes": device.memory_bytes}
    found["torch"] = torch.__version__
    if options.steps and options.steps.exists():
        found["steps"] = options.steps.read_text(encoding="utf-8").splitlines()

    def save() -> None:
        found["targets"] = verdicts(found)
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")

    def go_on(after: int) -> None:
        """In a new process, with what is left of the time."""
        save()
        left = deadline - time.monotonic()
        os.execv(sys.executable, [sys.executable, __file__, "--device", options.device, "--json", str(options.json), "--seconds", f"{left:.0f}",
                                  "--after", str(after)])

    if not options.after:
        found["copy_bytes_per_second"] = copy_bandwidth(clock, size.copy_bytes)
        save()
        print(f"{found['device']}, copy {found['copy_bytes_per_second'] / 1e9:.0f} GB/s; medians of {size.rounds} rounds of {size.steps} tokens\n")
        print(f"{'shape':<12}{'w':<6}{'kv':<5}{'depth':>7}{'ms/token':>10}{'tokens/s':>10}{'of copy':>11}{'prefill t/s':>12}", flush=True)
    bandwidth = found["copy_bytes_per_second"]
    with tempfile.TemporaryDirectory() as folder:
        last = deadline - size.reserve
        for number, (name, weights, kvs, depths) in enumerate(size.cases):
            if number < options.after:
                continue
            if time.monotonic() > last:
                found["left_out"].append(f"{name} {weights}")
                continue
            try:
                with Opened(write(name, Path(folder)), weights, max(depths) + 2 * size.chunk, size.chunk, options.device) as opened:
                    for kv in kvs:
                        for row in rows_of(opened, name, weights, kv, depths, size, clock, bandwidth, last):
                            found["rows"].append(row)
                            show(row)
                            save()
            except Exception as error:  # noqa: BLE001 - one case that does not run takes nothing from the others
                found["left_out"].append(f"{name} {weights}: {failure(error)}")
                print(found["left_out"][-1], flush=True)
                if is_broken(clock):             # nor does one that breaks the device's context
                    go_on(number + 1)
        products, whole = size.peers
        # What each may take on a GPU, its imports and compilers included: it is not begun where less time is left, so that all is told in time.
        peers: dict[str, tuple[float, Callable[[], object]]] = {
            f"bare products, prefill tokens/s, {products}": (5, lambda: size.chunk / products_seconds(clock, products, size.chunk)),
            f"torch SDPA, ms of all layers at {size.peer_depth}, {products}": (5, lambda: sdpa_ms(clock, products, size.peer_depth)),
            f"torch SDPA, ms of all layers at {size.peer_depth}, {whole}": (5, lambda: sdpa_ms(clock, whole, size.peer_depth)),
            f"transformers, static cache, ms/token, {whole}": (30, lambda: transformers_ms(clock, whole, Path(folder), False)),
            "llama.cpp": (20, lambda: llama_cpp(deadline - time.monotonic())),
            f"transformers, static cache, compiled, ms/token, {whole}":
                (100, lambda: transformers_ms(clock, whole, Path(folder), True) if clock.torch == "cuda" else None)}
        print()
        for what, (seconds, measured) in peers.items():
            if clock.torch == "cuda" and time.monotonic() + seconds > deadline:
                found["left_out"].append(what)
                continue
            try:
                found["peers"][what] = measured()
            except Exception as error:  # noqa: BLE001 - as above
                found["peers"][what] = failure(error)
            save()
            print(f"{what}: {found['peers'][what]}", flush=True)
    if found["left_out"]:
        print("left out: " + "; ".join(found["left_out"]))
    save()
    print("\ntargets\n" + "\n".join(f"{t['what']:<64}{t['measured']:>9}  wanted {t['wanted']:<10}{t['verdict']}" for t in found["targets"]))
    if not found["rows"]:
        raise SystemExit("nothing was measured")


if __name__ == "__main__":
    main()

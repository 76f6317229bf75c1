"""Measures kvrun on a GPU with random weights of real shapes: decode and prefill by weights, cache format and depth, beside the
device's own copy bandwidth, cuBLAS' own rate, torch's attention, and transformers with a static cache. One table, one JSON file."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from opened import Opened
from shapes import SHAPES, write

from kvrun.backends.cuda import require
from kvrun.cache.planner import attended_bytes, token_bytes

STEPS = 48          # decode steps of a round
ROUNDS = 5
# In order of what is most worth knowing: shape, weights, cache formats, depths.
CASES = [
    ("llama-8b", "bf16", ("f16",), (0, 2048)),
    ("llama-1b", "bf16", ("f16", "q8", "q4"), (0, 2048, 32768, 65536)),
    ("llama-8b", "q4", ("f16", "q8", "q4"), (0, 2048, 32768)),
    ("llama-8b", "q8", ("f16",), (0, 2048)),
    ("qwen3-0.6b", "bf16", ("f16", "q8", "q4"), (0, 2048, 32768)),
    ("llama-1b", "q4", ("f16",), (0, 2048)),
]


def seconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median time of `work`, which the device has finished."""
    work()
    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy within the device."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), 10)


def cublas_seconds(name: str, rows: int) -> float:
    """Time of the bare bfloat16 products of `rows` prompt rows through a model of this shape, without its head."""
    c = SHAPES[name]
    hidden, ffn, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    total = 0.0
    for n, k in ((q + 2 * kv, hidden), (hidden, q), (2 * ffn, hidden), (hidden, ffn)):
        x, w = (torch.randn(r, k, dtype=torch.bfloat16, device="cuda") for r in (rows, n))
        total += seconds(lambda x=x, w=w: torch.mm(x, w.t()))
    return total * c["num_hidden_layers"]


def sdpa_ms(name: str, depth: int) -> float:
    """One decode row's attention in all layers, by torch, over a dense bfloat16 cache."""
    c = SHAPES[name]
    q = torch.randn(1, c["num_attention_heads"], 1, c["head_dim"], dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(1, c["num_key_value_heads"], depth, c["head_dim"], dtype=torch.bfloat16, device="cuda") for _ in "kv")
    attend = torch.nn.functional.scaled_dot_product_attention
    return 1000 * c["num_hidden_layers"] * seconds(lambda: [attend(q, k, v, enable_gqa=True) for _ in range(20)]) / 20


def transformers_ms(name: str, folder: Path) -> float:
    """Milliseconds a token of transformers with a static cache, not compiled, greedy."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(write(name, folder))
    with torch.device("cuda"), torch.inference_mode():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        ids = torch.ones(1, 8, dtype=torch.long)
        settings = dict(do_sample=False, cache_implementation="static", disable_compile=True, eos_token_id=None, pad_token_id=0)

        def run(n: int) -> float:
            return seconds(lambda: model.generate(ids, min_new_tokens=n, max_new_tokens=n, **settings), 3)

        return 1000 * (run(40) - run(8)) / 32


def case(name: str, weights: str, kvs: tuple[str, ...], depths: tuple[int, ...], bandwidth: float, folder: Path, deadline: float) -> list[dict]:
    """Rows of the table for one set of weights."""
    rows: list[dict] = []
    n_ctx = max(depths) + 2304
    with Opened(write(name, folder), weights, n_ctx, 2048) as opened:
        for kv in kvs:
            if time.monotonic() > deadline:
                break
            track = opened.track(kv)
            layouts = opened.blueprint.layouts(kv, n_ctx)
            prefill = None
            for depth in depths:
                if depth == 0:
                    def read() -> None:
                        track.jump(0)
                        track.prefill(2048)

                    prefill = 2048 / seconds(read, 3)
                track.jump(depth)
                track.prefill(1)

                def decode() -> None:
                    for _ in range(STEPS):
                        track.decode()

                for _ in range(2):
                    decode()        # captures, for both turns
                taken = []
                for _ in range(ROUNDS):
                    started = time.perf_counter()
                    decode()
                    taken.append(1000 * (time.perf_counter() - started) / STEPS)
                ms = statistics.median(taken)
                mean = depth + int((ROUNDS / 2 + 2) * STEPS)
                moved = opened.blueprint.read_bytes + attended_bytes(opened.plan.groups, layouts, mean) + token_bytes(layouts)
                rows.append({"shape": name, "weights": weights, "kv": kv, "depth": depth, "ms_per_token": ms, "tokens_per_second": 1000 / ms,
                             "bytes_moved": moved, "share_of_copy": moved / (ms / 1000) / bandwidth,
                             "prefill_tokens_per_second": prefill if depth == 0 else None})
                show(rows[-1])
            track.close()
    return rows


def show(row: dict) -> None:
    """One line of the table."""
    prefill = f"{row['prefill_tokens_per_second']:>12.0f}" if row["prefill_tokens_per_second"] else " " * 12
    print(f"{row['shape']:<12}{row['weights']:<6}{row['kv']:<5}{row['depth']:>7}{row['ms_per_token']:>10.3f}{row['tokens_per_second']:>10.1f}"
          f"{100 * row['share_of_copy']:>9.0f} %{prefill}", flush=True)


def llama_cpp() -> str | None:
    """What LLAMA_BENCH says of LLAMA_MODEL, where both were brought along."""
    program, model = os.environ.get("LLAMA_BENCH"), os.environ.get("LLAMA_MODEL")
    if not program or not model:
        return None
    done = subprocess.run([program, "-m", model, "-ngl", "99", "-p", "512", "-n", "64", "-o", "json"], capture_output=True, text=True, timeout=90)
    return done.stdout if done.returncode == 0 else f"failed: {done.stderr[-300:]}"


def main() -> None:
    """See the module."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", type=Path, required=True)
    arguments.add_argument("--seconds", type=float, default=300.0)
    options = arguments.parse_args()
    deadline = time.monotonic() + options.seconds
    device = require().devices[0]
    bandwidth = copy_bandwidth()
    print(f"{device.name}, copy {bandwidth / 1e9:.0f} GB/s; medians of {ROUNDS} rounds of {STEPS} tokens\n")
    print(f"{'shape':<12}{'w':<6}{'kv':<5}{'depth':>7}{'ms/token':>10}{'tokens/s':>10}{'of copy':>11}{'prefill t/s':>12}")
    rows, skipped, peers = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, weights, kvs, depths in CASES:
            if time.monotonic() > deadline - 40:
                skipped.append(f"{name} {weights}")
                continue
            rows += case(name, weights, kvs, depths, bandwidth, Path(folder), deadline - 20)
        others: dict[str, Callable[[], object]] = {
            "cublas_prefill_2048_tokens_per_second_llama-8b": lambda: 2048 / cublas_seconds("llama-8b", 2048),
            "sdpa_ms_all_layers_llama-8b_32768": lambda: sdpa_ms("llama-8b", 32768),
            "sdpa_ms_all_layers_llama-1b_32768": lambda: sdpa_ms("llama-1b", 32768),
            "transformers_static_cache_ms_llama-1b": lambda: transformers_ms("llama-1b", Path(folder)),
            "llama_cpp": llama_cpp}
        print()
        for what, measured in others.items():
            if time.monotonic() > deadline:
                skipped.append(what)
                continue
            try:
                peers[what] = measured()
            except Exception as error:  # noqa: BLE001 - a peer that does not run takes nothing from what was measured
                peers[what] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
            print(f"{what}: {peers[what]}", flush=True)
    if skipped:
        print("no time for: " + ", ".join(skipped))
    options.json.write_text(json.dumps({"device": device.name, "arch": device.arch, "copy_bytes_per_second": bandwidth, "rows": rows,
                                        "peers": peers, "skipped": skipped}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

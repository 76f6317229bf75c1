"""A prompt and a few tokens of a tiny random model in every weight and cache format: what compute-sanitizer looks at, and the first
thing that runs on a device."""

import sys
import tempfile
from pathlib import Path

from opened import Opened
from shapes import write

WAYS = {"direct": ("direct",), "graph": ("graph",), "both": ("direct", "graph")}


def main(device: str, how: str) -> None:
    """Across the border of a page, so that one is quantized. direct: kernels are launched one by one; graph: as they always are, once
    captured. Ends with 1 where the two give other tokens."""
    for weights, kv in (("bf16", "f16"), ("q8", "q8"), ("q4", "q4"), ("q4s", "q8/q4")):
        answers = []
        for way in WAYS[how]:
            with tempfile.TemporaryDirectory() as folder, Opened(write("tiny", Path(folder)), weights, 256, 128, device) as opened:
                if way == "direct":
                    opened.device.captured = lambda work: work
                track = opened.track(kv)
                track.jump(0)
                track.prefill(124)
                answers.append([track.decode() for _ in range(8)])
                print(f"{weights:<6}{kv:<7}{way:<8}{answers[-1]}", flush=True)
                track.close()
        if answers[0] != answers[-1]:
            sys.exit("captured, the same step gives other tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A prompt and a few tokens of a tiny random model in every weight and cache format: what compute-sanitizer looks at."""

import sys
import tempfile
from pathlib import Path

from opened import Opened
from shapes import write


def main(device: str, direct: bool) -> None:
    """Across the border of a page, so that one is quantized. direct: kernels are launched one by one, never as a graph."""
    with tempfile.TemporaryDirectory() as folder:
        for weights, kv in (("bf16", "f16"), ("q8", "q8"), ("q4", "q4"), ("q4s", "q8/q4")):
            with Opened(write("tiny", Path(folder)), weights, 256, 128, device) as opened:
                if direct:
                    opened.device.captured = lambda work: work
                track = opened.track(kv)
                track.jump(0)
                track.prefill(126)
                print(weights, kv, [track.decode() for _ in range(5)], flush=True)
                track.close()


if __name__ == "__main__":
    main(sys.argv[1], "direct" in sys.argv[2:])

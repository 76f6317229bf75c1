"""Peak of resident memory of `kvrun run`, a process each time, against what `kvrun plan` says beforehand."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

MIB = 2**20
KVRUN = [sys.executable, "-m", "kvrun"]


def planned(model: str, n_ctx: int) -> dict[str, int]:
    """Total bytes by format."""
    said = json.loads(subprocess.run([*KVRUN, "plan", model, "-n", str(n_ctx), "--json"], check=True, capture_output=True).stdout)
    return {row["kv"]: row["total_bytes"] for row in said["table"] if row["n_ctx"] == n_ctx}


def peak(model: str, n_ctx: int, kv: str) -> int:
    """Bytes."""
    command = [*KVRUN, "run", model, "--raw", "Once upon a time", "--max-tokens", "32", "-n", str(n_ctx), "--kv", kv, "-q"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} ended with status {status}")
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--n-ctx", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--kv", nargs="*", default=["f32", "f16", "q8", "q8/q4", "q4"])
    options = parser.parse_args()
    print(f"{'model':14}{'n_ctx':>7}  {'kv':7}{'plan MiB':>9}{'peak MiB':>9}  peak/plan")
    for model in options.models:
        for n_ctx in options.n_ctx:
            plan = planned(model, n_ctx)
            for kv in options.kv:
                seen = peak(model, n_ctx, kv)
                print(f"{model:14}{n_ctx:>7}  {kv:7}{plan[kv] / MIB:9.0f}{seen / MIB:9.0f}  {seen / plan[kv]:.3f}", flush=True)


if __name__ == "__main__":
    main()

"""What a fresh process costs, with the files in the page cache: the first token of `kvrun run`, `kvrun --help`, and what is imported.

The time runs from starting the process to the first byte of the answer on a pipe. With --peer, a llama-completion binary answers
the same prompt from the same file in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "What is the capital of France?"
HEAVY = ("torch", "transformers", "numpy", "tokenizers", "jinja2", "gguf", "safetensors", "rich", "typer", "prompt_toolkit",
         "huggingface_hub", "pydantic", "requests", "httpx")


def first_byte(command: list[str]) -> float:
    """Seconds until `command` has written anything to stdout; waits for its end."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        byte = os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - started
        process.stdout.read()
        problem = process.stderr.read().decode(errors="replace")
    if process.returncode or not byte:
        raise SystemExit(f"{command[0]} ended with {process.returncode}: {problem.strip()[-300:]}")
    return seconds


def imported(arguments: list[str]) -> list[str]:
    """Which of HEAVY a `kvrun` command with these arguments imports."""
    code = ("import json, sys\n"
            "from kvrun.cli.main import main\n"
            "try:\n    main(json.loads(sys.argv[1]))\n"
            "except SystemExit:\n    pass\n"
            "print(json.dumps([m for m in json.loads(sys.argv[2]) if m in sys.modules]), file=sys.stderr)\n")
    run = subprocess.run([sys.executable, "-c", code, json.dumps(arguments), json.dumps(HEAVY)], capture_output=True, text=True)
    return json.loads(run.stderr.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="what `kvrun run` is given (default: %(default)s)")
    parser.add_argument("-r", "--rounds", type=int, default=7)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--peer", type=Path, help="a llama-completion binary (peer.py builds one)")
    parser.add_argument("--peer-model", type=Path, help="the .gguf file for it")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    if options.peer and not options.peer_model:
        parser.error("--peer needs --peer-model")

    program = str(Path(sys.executable).with_name("kvrun"))
    run = ["run", options.model, PROMPT, "--temp", "0", "--max-tokens", "4", "--threads", str(options.threads)]
    commands = {"kvrun run, first token": [program, *run], "kvrun --help": [program, "--help"]}
    if options.peer:
        commands["llama-completion, first token"] = [
            str(options.peer), "-m", str(options.peer_model), "-p", PROMPT, "-n", "4", "-t", str(options.threads), "--temp", "0",
            "-no-cnv", "--no-display-prompt"]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for name in commands:
        first_byte(commands[name])                        # fills the page cache and Python's bytecode
    for _ in range(options.rounds):
        for name, command in commands.items():
            seconds[name].append(first_byte(command))
    modules = {"kvrun run": imported(run), "kvrun --help": imported(["--help"])}

    for name, values in seconds.items():
        print(f"{name:32}{statistics.median(values):7.3f} s   ({min(values):.3f} to {max(values):.3f}, {len(values)} runs)")
    for name, names in modules.items():
        print(f"{name} imports: {', '.join(names) or 'nothing heavy'}")
    if options.json:
        options.json.write_text(json.dumps({"seconds": seconds, "imports": modules}, indent=1), encoding="utf-8")
    if any("torch" in names for names in modules.values()):
        raise SystemExit("torch was imported on the CPU path")


if __name__ == "__main__":
    main()

"""Coverage-guided fuzzing of one target, by hand: python tests/fuzz/run.py TARGET --seconds N.

Begins with the kept corpus. An input that breaks the target is written to --findings; once mended it belongs into tests/fuzz/corpus/TARGET.
Needs atheris, which is part of the test extra where it has wheels: Linux on x86-64, CPython 3.11 to 3.13.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
import tempfile
import types
from pathlib import Path
from random import Random

TESTS = Path(__file__).resolve().parents[1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="a name; 'list' prints them")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--runs", type=int, default=-1, help="inputs, where that is less")
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "kvrun-findings")
    parser.add_argument("--corpus", type=Path, help="where inputs that reach new code go; default: a folder that is removed")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    try:
        import atheris
    except ImportError:
        sys.exit(f"{sys.argv[0]}: atheris is not installed: it has wheels for Linux on x86-64, CPython 3.11 to 3.13 (pip install atheris)")
    package = types.ModuleType("kvrun_tests")         # the modules here import each other as parts of a package
    package.__path__ = [str(TESTS)]
    sys.modules["kvrun_tests"] = package
    with atheris.instrument_imports(include=["kvrun", "json", "tomllib"]):
        targets = importlib.import_module("kvrun_tests.fuzz.targets").TARGETS
        mutate = importlib.import_module("kvrun_tests.fuzz.mutate").mutate
    if options.target not in targets:
        sys.exit("\n".join(targets))
    target = targets[options.target]
    inputs, options.findings = tempfile.mkdtemp(prefix="kvrun-corpus-"), options.findings.resolve()
    for name, data in target.corpus().items():
        (Path(inputs) / name).write_bytes(data)
        target(data)                                   # what is made once is made now
    folder = options.findings / target.name
    folder.mkdir(parents=True, exist_ok=True)
    if options.corpus:
        options.corpus.mkdir(parents=True, exist_ok=True)

    def changed(data: bytes, limit: int, seed: int) -> bytes:
        """Half of the changes are ours, which know the format, half libFuzzer's, which know the coverage."""
        draw = Random(seed)
        return mutate(data, draw, target.kind)[:limit] if draw.random() < 0.5 else atheris.Mutate(data, limit)

    places = [str(options.corpus)] if options.corpus else []
    # No limit on resident memory: the peak that libFuzzer asks for is that of the process which started this one, where larger.
    atheris.Setup([sys.argv[0], *places, inputs, f"-artifact_prefix={folder}/", f"-max_total_time={options.seconds}",
                   f"-runs={options.runs}", "-timeout=20",
                   "-rss_limit_mb=0", "-malloc_limit_mb=3000", "-max_len=65536", "-print_final_stats=1", "-reload=0"], target, custom_mutator=changed)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(inputs, ignore_errors=True)


if __name__ == "__main__":
    main()

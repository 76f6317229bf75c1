"""The CPU kernels under the address, undefined-behaviour and thread sanitizers, every instruction set, and mistakes planted in them, which must
be found. The tests of this folder run in a process of its own over a library that is built so; a share of them, drawn anew. GCC's thread
sanitizer does not see vector loads and stores, so of the kernels it watches the pool, the counters and scalar code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import kvrun

from .plans import GRANTED

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:exitcode=99", "UBSAN_OPTIONS": "print_stacktrace=1",
           "TSAN_OPTIONS": "exitcode=99:halt_on_error=1", "OPENBLAS_NUM_THREADS": "1"}  # numpy's threads are not built so


@dataclass
class Built:
    """A sanitized library in a copy of the package. sources: of the kernels, a copy. runtime: what must be loaded first."""

    runtime: Path
    sources: Path
    build: Path
    package: Path

    def make(self) -> None:
        subprocess.run(["cmake", "--build", self.build, "--target", "kvrun_cpu", "abi", "-j", "2"], check=True, stdout=subprocess.DEVNULL)
        for name in ("libkvrun_cpu.so", "_abi.py"):
            shutil.copy(self.build / name, self.package / "kvrun/backends" / name)

    def run(self, share: int, *which: str) -> subprocess.CompletedProcess:
        """The tests `which`, one of `share` of each."""
        env = os.environ | OPTIONS | {"PYTHONPATH": str(self.package), "LD_PRELOAD": str(self.runtime), "KVRUN_TEST_SHARE": str(share), "PYTHONSAFEPATH": "1"}
        return subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-vv", "-s", "-x", "--deselect", str(Path(__file__).relative_to(HERE.parents[1])),
                               *(str(HERE / name) for name in which)], capture_output=True, text=True, env=env, cwd=HERE.parents[1])


def built(kind: str, runtime: str, folder: Path) -> Built:
    """kind: as -fsanitize= takes it."""
    cxx = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if not cxx or not shutil.which("cmake"):
        pytest.skip("no C++ compiler, or no cmake, to build the kernels with")
    found = Path(subprocess.run([cxx, f"-print-file-name={runtime}"], capture_output=True, text=True).stdout.strip())
    if not found.is_file():
        pytest.skip(f"this compiler has no {runtime}")
    made = Built(found.resolve(), folder / "kernels", folder / "build", folder / "package")
    shutil.copytree(KERNELS, made.sources)
    shutil.copytree(Path(kvrun.__file__).parent, made.package / "kvrun", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run(["cmake", *generator, "-S", made.sources, "-B", made.build, f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CXX_COMPILER={cxx}",
                    "-DCMAKE_CUDA_COMPILER=NOTFOUND", f"-DKVRUN_SANITIZE={kind}"], check=True, stdout=subprocess.DEVNULL)
    made.make()
    return made


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return built("address,undefined", "libasan.so", tmp_path_factory.mktemp("address"))


@pytest.fixture(scope="module")
def thread(tmp_path_factory):
    made = built("thread", "libtsan.so", tmp_path_factory.mktemp("thread"))
    if "unexpected memory mapping" in made.run(1, "test_act.py").stderr:
        pytest.skip("this system's address layout is too random for the thread sanitizer's runtime")
    return made


def clean(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Sanitizer" not in done.stderr and "runtime error" not in done.stderr
    for isa in GRANTED:
        assert f"[{isa}" in done.stdout or f"-{isa}" in done.stdout, f"nothing ran with {isa}"


OPS = ("test_act.py", "test_append.py", "test_attend.py", "test_linear.py", "test_norm.py", "test_pack.py", "test_pool.py", "test_quant_cache.py", "test_rope.py",
       "test_sample.py", "test_step.py")


def test_addresses_and_arithmetic(address):
    clean(address.run(32, *OPS))


def test_threads(thread):
    clean(thread.run(64, *OPS))


# What is planted: (file, what is there, what takes its place, which test, what must be said)
PLANTED = {
    "past a row": ("address", "norm.cpp", "whole = dim / 16 * 16, rest = dim - whole;", "whole = (dim + 15) / 16 * 16, rest = 0;", "test_norm.py", "heap-buffer-overflow"),
    "a shift too far": ("address", "act.cpp", "const int PART = 512;", "const int PART = 512; volatile int far = 40; if ((1 << far) == 3) return;", "test_act.py", "shift exponent 40"),
    "a barrier that lets everybody through": ("thread", "pool.cpp", "barrier_gate.wait_while(round, barrier_spin_ns);\n        return;", "return;", "test_norm.py", "data race"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found(request, name):
    kind, file, there, instead, which, said = PLANTED[name]
    made: Built = request.getfixturevalue(kind)
    path = made.sources / "cpu" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(there) == 1
    path.write_text(text.replace(there, instead), encoding="utf-8")
    try:
        made.make()
        for _ in range(4):                 # a lost barrier may also crash before the race is reported
            done = made.run(4, which)
            if said in done.stdout + done.stderr:
                break
    finally:
        path.write_text(text, encoding="utf-8")
    assert done.returncode != 0 and said in done.stdout + done.stderr, done.stdout[-2000:] + done.stderr[-2000:]

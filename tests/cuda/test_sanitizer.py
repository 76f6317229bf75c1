"""The kernels under the address and undefined-behaviour sanitizers, and mistakes planted in them, which must be found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .emulator import KERNELS, SANITIZE, build

HERE = Path(__file__).parent
FLAGS = [*SANITIZE, "-O1", "-g0"]


@pytest.fixture(scope="module")
def sanitized(cxx, tmp_path_factory) -> tuple[str, Path, Path]:
    """(compiler, folder of the sanitized build, the runtime to load first)."""
    runtime = subprocess.run([cxx, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_file():
        pytest.skip("this compiler has no address sanitizer")
    folder = tmp_path_factory.mktemp("sanitized")
    build(cxx, folder, FLAGS)
    return cxx, folder, Path(runtime).resolve()


def run(library: Path, runtime: Path, which: str) -> subprocess.CompletedProcess:
    """The kernels' tests named by -k `which`, in a process of its own over a sanitized library."""
    options = "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0:exitcode=99"
    env = os.environ | {"KVRUN_SIMT_LIBRARY": str(library), "LD_PRELOAD": str(runtime), "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-s", "-x", *(str(HERE / f"test_{name}.py") for name in ("kernels", "ops", "fused")),
                           "-k", f"simt and ({which})"], capture_output=True, text=True, env=env, cwd=HERE.parents[1])


def test_no_report(sanitized):
    """Each kernel at least once, in every format."""
    _, folder, runtime = sanitized
    which = ("(test_linear and 75-96) or test_embed or test_norm or test_act or test_rope or test_gather or test_unpack or (test_append and head)"
             " or (test_attend and 129-100) or (head_sizes and (80 or 192)) or (to_the_bit and (48 or 64)) or (quantized_lengths and 129) or (several_pages and q4)"
             " or (test_draws and (0.9 or 50)) or (penalty and 0.9) or two_sequences or advance"
             " or (test_qkv and 64) or test_gated or layer_in_one_step")
    done = run(folder / "libkvrun_simt.so", runtime, which)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Sanitizer" not in done.stderr and "runtime error" not in done.stderr


# What is planted: (source, the file of it that is changed, what is there, what takes its place, which tests, what must be said)
PLANTED = {
    "past the dynamic shared memory": ("attend.cu", "attend.cu", "end = total + tile * d;", "end = total + tile * d - 4;",
                                       "test_attend and 129-100", "heap-buffer-overflow"),
    "past a static shared array": ("append.cu", "append.cuh", "constexpr int kMaxHeadDim = 256;", "constexpr int kMaxHeadDim = 48;", "to_the_bit and 64",
                                   "global-buffer-overflow"),
    "past a row of activations": ("act.cu", "act.cu", "|| i >= op.dim) return;", "|| i > op.dim) return;", "test_act", "heap-buffer-overflow"),
    "a missing barrier": ("linear.cu", "linear.cuh", "part[threadIdx.x / 32]);\n    __syncthreads();\n", "part[threadIdx.x / 32]);\n", "test_linear", "AssertionError"),
    "copies that are not waited for": ("attend_tiles.cu", "attend_tiles.cu", "        if (HALF) wait_copies<1>();              // V is here\n", "",
                                       "quantized_lengths and 129", "AssertionError"),
    "a missing barrier of a warp": ("append.cu", "append.cuh", "        __syncwarp();\n        const int half", "        const int half", "test_append and 96", "AssertionError"),
    "a counter left standing": ("linear_qkv.cu", "launch.cuh", "        if (last) *counter = 0;\n", "", "layer_in_one_step", "AssertionError"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found(sanitized, name):
    cxx, folder, runtime = sanitized
    source, file, there, instead, which, said = PLANTED[name]
    text = (KERNELS / "cuda" / file).read_text(encoding="utf-8")
    assert text.count(there) == 1
    library = build(cxx, folder, FLAGS, (source, file, text.replace(there, instead)))
    for _ in range(4):                             # a missing barrier shows in some orders, which are drawn anew
        done = run(library, runtime, which)
        if done.returncode:
            break
    assert done.returncode != 0 and said in done.stdout + done.stderr, done.stdout[-2000:] + done.stderr[-2000:]

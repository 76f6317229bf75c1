"""What nvcc makes of the kernels, run on the host (kernels/simt/ptx.py): a whole model, mistakes that must be found, and what PTX alone
shows. The kernels' own tests run on it as well, as `ptx`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvrun.backends import simt

from . import translated
from .emulator import KERNELS
from .test_executor import test_a_tiny_model_answers_as_the_reference_does  # noqa: F401 - here over the executor below

HERE = Path(__file__).parent


@pytest.fixture
def executor(ptx_build, monkeypatch) -> str:
    """The CUDA executor over the translated library."""
    monkeypatch.setattr(simt, "LIBRARY", ptx_build.library)
    return "simt"


UNORDERED = "nothing between that puts the two in order"
# What is planted: (source, the file of it that is changed, what is there, what takes its place, which tests, what must be said)
PLANTED = {
    "a missing barrier": ("linear.cu", "linear.cuh", "part[threadIdx.x / 32]);\n    __syncthreads();\n", "part[threadIdx.x / 32]);\n", "test_linear",
                          f"{UNORDERED}|which this block has not written"),
    "a missing barrier of a warp": ("append.cu", "append.cuh", "        __syncwarp();\n        const int half", "        const int half", "test_append and 96",
                                    f"{UNORDERED}|which this block has not written"),
    "a missing fence": ("linear_qkv.cu", "launch.cuh", "        __threadfence();\n        last", "        last", "test_qkv and 64", UNORDERED),
    "a read of what the kernel before writes": ("norm.cu", "norm.cu", "    begin_kernel();\n", "    if (op.x[0] == 7) return;\n    begin_kernel();\n",
                                                "ops_run_in_order", "before it waited for that one"),
    "shared memory that nobody wrote": ("act.cu", "act.cu", "    begin_kernel();\n", "    begin_kernel();\n    __shared__ float none[4];\n"
                                        "    if (none[threadIdx.x % 4] == 7) return;\n    none[threadIdx.x % 4] = op.x[0];\n", "test_act", "which this block has not written"),
    "past a static shared array": ("append.cu", "append.cuh", "constexpr int kMaxHeadDim = 256;", "constexpr int kMaxHeadDim = 48;", "to_the_bit and 64",
                                   f"where no variable is|{UNORDERED}"),
    "an address between words": ("gather.cu", "gather.cu", "= op.x[(int64_t)state->out_row[row] * op.dim + i];",
                                 "= *(const float *)((const char *)(op.x + (int64_t)state->out_row[row] * op.dim + i) - 2);", "test_gather", "no multiple of 4"),
    "copies that are not waited for": ("attend_tiles.cu", "attend_tiles.cu", "        if (HALF) wait_copies<1>();              // V is here\n", "",
                                       "quantized_lengths and 129", "to which a copy is under way"),
    "operands in the wrong order": ("attend_tiles.cu", "mma.cuh", '"f"(y), "f"(x)', '"f"(x), "f"(y)', "quantized_lengths and 129", "AssertionError"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found(ptx_build, name):
    source, file, there, instead, which, said = PLANTED[name]
    text = (KERNELS / "cuda" / file).read_text(encoding="utf-8")
    assert there in text
    library = ptx_build.changed(source, file, text.replace(there, instead))
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", *(str(HERE / f"test_{part}.py") for part in ("kernels", "ops", "fused")),
                           "-k", f"simt and ({which})"], capture_output=True, text=True, env=os.environ | {"KVRUN_SIMT_LIBRARY": str(library)}, cwd=HERE.parents[1])
    assert done.returncode == 1 and re.search(said, done.stdout), done.stdout[-3000:] + done.stderr[-2000:]


COUNTED = r"""
#include "count.h"
#include <cstdio>
extern "C" void kv_count_tell(void (*)(const char *, int, uint64_t, uint64_t, uint64_t));

int main() {
    ptx::site = ptx::add_sites({"same", "row", "column", "wide", "apart"});
    for (unsigned lane = 0; lane < 64; lane++) {             // two warps
        const uint32_t first = ptx::site;
        ptx::count_access(true, lane, 64, 4);
        ptx::site++, ptx::count_access(true, lane, 4 * lane, 4);
        ptx::site++, ptx::count_access(true, lane, 128 * lane, 4);
        ptx::site++, ptx::count_access(true, lane, 16 * lane, 16);
        ptx::site++, ptx::count_access(false, lane, 1000 * 32 + 64 * lane, 8);
        ptx::site = first;
    }
    kv_count_tell([](const char *where, int shared, uint64_t accesses, uint64_t units, uint64_t least) {
        printf("%s %d %d %d %d\n", where, shared, (int)accesses, (int)units, (int)least);
    });
}
"""


def test_what_accesses_cost(cxx, tmp_path):
    (tmp_path / "main.cpp").write_text(COUNTED, encoding="utf-8")
    subprocess.run([cxx, "-std=c++17", f"-I{translated.SIMT}", str(tmp_path / "main.cpp"), str(translated.SIMT / "count.cpp"), "-o", str(tmp_path / "main")], check=True)
    said = subprocess.run([str(tmp_path / "main")], check=True, capture_output=True, text=True).stdout
    assert said.splitlines() == ["same 1 2 2 2", "row 1 2 2 2", "column 1 2 64 2", "wide 1 2 8 8", "apart 0 2 64 16"]


def test_nothing_may_be_fused_in_cache_pages(ptx_build):
    """A product or sum without a rounding of its own is the assembler's to fuse: pages are the same to the bit on every machine."""
    sources = translated.unfused()
    assert sources
    for source in sources:
        assert not re.search(r"\b(mul|add|sub|mad)(\.ftz)?\.f32\b", ptx_build.ptx(source)), source


@pytest.mark.parametrize("statement", ["frob.u32 %r1, %r2;", "add.cc.u32 %r1, %r1, %r2;", "ld.global.b128 %r1, [%rd1];", "mul.rz.f32 %f1, %f1, %f1;"])
def test_what_is_not_known_is_an_error(statement):
    """And never something near it."""
    with pytest.raises(translated.Unknown, match=statement[:8]):
        translated.Module(".version 9.0\n.target sm_90\n.address_size 64\n.entry one(\n.param .u64 one_param_0\n)\n{\n.reg .b32 %r<3>;\n.reg .f32 %f<3>;\n"
                          f".reg .b64 %rd<3>;\n{statement}\nret;\n}}\n")

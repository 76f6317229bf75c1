"""Builds llama.cpp's llama-bench from the source package of llama-cpp-python, once, into a cache folder.

builds: "avx512" has everything up to AVX512-VNNI and BF16 but no AMX; "amx" is GGML_NATIVE with AMX, for which a compiler
barrier is put before the tile configuration is loaded: gcc 12 drops the stores to it, and the first tile instruction dies.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from pathlib import Path

import platformdirs

PACKAGE = "llama-cpp-python==0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
BUILDS = ("avx512", "amx")

_COMMON = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
           "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
           "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TOOLS=ON"]
_ON = ["AVX", "AVX2", "BMI2", "FMA", "F16C", "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16"]
_OFF = ["NATIVE", "AMX_TILE", "AMX_INT8", "AMX_BF16"]
_FLAGS = {"avx512": [f"-DGGML_{name}=ON" for name in _ON] + [f"-DGGML_{name}=OFF" for name in _OFF], "amx": ["-DGGML_NATIVE=ON"]}


def cache_dir() -> Path:
    """Where sources and builds are kept."""
    return Path(platformdirs.user_cache_dir("kvrun-bench"))


def sources(folder: Path, build: str) -> Path:
    """llama.cpp's sources for `build`, fetched and unpacked on first use."""
    target = folder / f"src-{build}"
    found = next(target.glob("*/vendor/llama.cpp/CMakeLists.txt"), None)
    if found:
        return found.parent
    folder.mkdir(parents=True, exist_ok=True)
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="ascii")
    subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--require-hashes",
                    "-r", str(wanted), "-d", str(folder)], check=True)
    with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(target, filter="data")
    root = next(target.glob("*/vendor/llama.cpp/CMakeLists.txt")).parent
    if build == "amx":
        tiles = root / "ggml/src/ggml-cpu/amx/mmq.cpp"
        text = tiles.read_text(encoding="utf-8")
        call = "    _tile_loadconfig(&tc);"
        if text.count(call) != 1:
            raise SystemExit(f"{tiles}: the place for the compiler barrier was not found")
        tiles.write_text(text.replace(call, '    __asm__ volatile("" : : "r"(&tc) : "memory");\n' + call), encoding="utf-8")
    return root


def ensure(build: str, target: str = "llama-bench", jobs: int = 2) -> Path:
    """Path of the program `target` of `build`, built on first use (minutes). Needs cmake and a C++ compiler."""
    folder = cache_dir()
    binary = folder / f"build-{build}" / "bin" / target
    if not binary.exists():
        root = sources(folder, build)
        subprocess.run(["cmake", "-S", str(root), "-B", str(binary.parents[1]), *_COMMON, *_FLAGS[build]], check=True)
        subprocess.run(["cmake", "--build", str(binary.parents[1]), "--target", target, "-j", str(jobs)], check=True)
    return binary


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", choices=BUILDS)
    parser.add_argument("--target", default="llama-bench", help="program to build (llama-bench, llama-completion, llama-perplexity)")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="compilers at once")
    arguments = parser.parse_args()
    print(ensure(arguments.build, arguments.target, arguments.jobs))

"""Builds the sources of kernels/cuda for the host."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"
FLAGS = ["-std=c++17", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-DKVRUN_SIMT", "-Wno-unknown-pragmas"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def sources() -> list[Path]:
    """All that the emulated library is made of: kernels/cuda without what asks a driver for devices."""
    kernels = [path for path in sorted((KERNELS / "cuda").glob("*.cu")) if path.name != "device.cu"]
    return [*kernels, KERNELS / "cuda/step.cpp", KERNELS / "simt/simt.cpp"]


def build(cxx: str, folder: Path, extra: list[str] = [], changed: tuple[str, str, str] | None = None) -> Path:  # noqa: B006 - only read
    """libkvrun_simt.so in `folder`, two sources at a time; what is there already is not compiled again. changed: (a source, a file of
    kernels/cuda, its text): that source is compiled as if the file had that text. CalledProcessError where one does not compile."""
    def compile_one(source: Path) -> str:
        target = folder / (source.name + ".o")
        if changed and source.name == changed[0]:
            tree = folder / "changed"
            shutil.copytree(KERNELS, tree, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cpu"))
            (tree / "cuda" / changed[1]).write_text(changed[2], encoding="utf-8")
            source, target = tree / "cuda" / source.name, folder / "changed.o"
        elif target.exists():
            return str(target)
        subprocess.run([cxx, *FLAGS, *extra, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources()))
    library = folder / ("changed.so" if changed else "libkvrun_simt.so")
    subprocess.run([cxx, "-shared", *extra, *objects, "-o", str(library)], check=True)
    return library

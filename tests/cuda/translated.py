"""Builds libkvrun_cuda as nvcc makes it, its PTX translated to the host: kernels/simt/ptx.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .emulator import KERNELS

SIMT = KERNELS / "simt"
sys.path.append(str(SIMT))
from ptx import Module, Unknown  # noqa: E402, F401 - a script of the build, in no package

FLAGS = ["-std=c++17", "-g0", "-fPIC", "-fvisibility=hidden", "-w", "-fno-strict-aliasing", "-ffp-contract=off", "-DKVRUN_SIMT", f"-I{SIMT}"]
LISTS = KERNELS / "cuda/CMakeLists.txt"


def compiler() -> str | None:
    """nvcc."""
    places = (os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc")
    return next((str(place) for place in places if place and shutil.which(place)), None)


def unfused() -> list[str]:
    """The sources that are built with -fmad=false, as CMake has them."""
    match = re.search(r"set_source_files_properties\(([^)]*?) PROPERTIES COMPILE_OPTIONS -fmad=false\)", LISTS.read_text(encoding="utf-8"))
    return match[1].split()


def run(*command: object) -> None:
    """One command of the build. CalledProcessError with what it said, where it fails."""
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)


class Build:
    """A build in `folder` for the PTX of one architecture, two sources at a time. count: with kernels/simt/count.h."""

    def __init__(self, nvcc: str, cxx: str, folder: Path, arch: int = 90, *, count: bool = False) -> None:
        self.nvcc, self.cxx, self.folder, self.arch, self.count = nvcc, cxx, folder, arch, count
        self.library = folder / "libkvrun_ptx.so"

    def whole(self) -> Path:
        """The library."""
        sources = sorted((KERNELS / "cuda").glob("*.cu"))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self._module, sorted(sources, key=lambda path: -path.stat().st_size)))
            list(pool.map(self._runtime, (SIMT / f"{name}.cpp" for name in ("simt", "ptx", "watch", *(["count"] if self.count else [])))))
        host = ["-std=c++17", "-c", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        run(self.nvcc, *host, f"-DKVRUN_ARCH={self.arch}", SIMT / "cudart.cpp", "-o", self.folder / "cudart.o")
        run(self.nvcc, *host, "-Dkv_cuda_step=kv_cuda_step_within", KERNELS / "cuda/step.cpp", "-o", self.folder / "step.o")
        return self._link(self.library)

    def changed(self, source: str, file: str, text: str) -> Path:
        """The library with `source` compiled as if `file` of kernels/cuda had that text; whole() comes before."""
        tree = self.folder / "changed"
        shutil.copytree(KERNELS, tree, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cpu"))
        (tree / "cuda" / file).write_text(text, encoding="utf-8")
        objects = self._module(tree / "cuda" / source, "changed-", "-O0")
        return self._link(self.folder / "changed.so", instead={self.folder / f"{path.name.removeprefix('changed-')}": path for path in objects})

    def ptx(self, source: str) -> str:
        """What nvcc made of a source."""
        return (self.folder / Path(source).stem / f"{Path(source).stem}.ptx").read_text(encoding="utf-8")

    def _module(self, source: Path, prefix: str = "", optimize: str = "-O1") -> list[Path]:
        """Host code by nvcc, its PTX by ptx.py and the host's compiler."""
        kept = self.folder / f"{prefix}{source.stem}"
        kept.mkdir(exist_ok=True)
        host, device = self.folder / f"{prefix}{source.stem}-host.o", self.folder / f"{prefix}{source.stem}-device.o"
        run(self.nvcc, "-std=c++17", "-c", "--keep", "--keep-dir", kept, "-Xcompiler", "-fPIC,-fvisibility=hidden",
            "-gencode", f"arch=compute_{self.arch},code=compute_{self.arch}", *(["-fmad=false"] if source.name in unfused() else []), *(["-lineinfo"] if self.count else []),
            '-DKVRUN_TARGETS="PTX on the host"', source, "-o", host)
        text = (kept / f"{source.stem}.ptx").read_text(encoding="utf-8")
        (kept / "device.cpp").write_text(Module(text, sites=self.count).text(), encoding="utf-8")
        run(self.cxx, *FLAGS, optimize, "-c", kept / "device.cpp", "-o", device)
        return [host, device]

    def _runtime(self, source: Path) -> None:
        run(self.cxx, *FLAGS, *(["-DPTX_COUNT"] if self.count else []), "-O2", "-c", source, "-o", self.folder / f"{source.stem}.o")

    def _link(self, library: Path, instead: dict[Path, Path] = {}) -> Path:  # noqa: B006 - only read
        objects = [instead.get(path, path) for path in sorted(self.folder.glob("*.o")) if not path.name.startswith("changed-")]
        run(self.cxx, "-shared", "-Wl,-z,defs", *objects, "-o", library)
        return library

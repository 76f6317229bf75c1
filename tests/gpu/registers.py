"""Registers, shared memory and spills of every kernel, as a build's folder has them (kernels/cuda/record.py). Ends with 1 where one spills."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PER_MULTIPROCESSOR = 65536


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture. spilled: bytes of registers stored to and loaded from memory."""

    name: str
    arch: str
    registers: int
    shared_bytes: int
    spilled: int


def of_build(folder: Path) -> list[Kernel]:
    """All kernels of the build in `folder`."""
    return [kernel for file in sorted(folder.rglob("*.registers")) for kernel in parse(file.read_text(encoding="utf-8", errors="replace"))]


def parse(report: str) -> list[Kernel]:
    """What the compiler said, in its order."""
    kernels: list[Kernel] = []
    name = arch = ""
    spilled = 0
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            name, arch, spilled = *found.groups(), 0
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(found[1]) + int(found[2])
        elif (found := re.search(r"Used (\d+) registers", line)) and name:
            shared = re.search(r"(\d+) bytes smem", line)
            kernels.append(Kernel(name, arch, int(found[1]), int(shared[1]) if shared else 0, spilled))
            name = ""
    return kernels


def shown(mangled: str) -> str:
    """A kernel's name without its parameters."""
    tool = shutil.which("c++filt")
    text = subprocess.run([tool, mangled], capture_output=True, text=True).stdout.strip() if tool else mangled
    return re.sub(r"\((?!anonymous).*", "", text).removeprefix("void ").replace("kv::", "")


def main(path: str) -> None:
    """One line a kernel: the most registers over the architectures, and where it spills."""
    kernels = of_build(Path(path))
    for mangled in sorted({k.name for k in kernels}):
        same = [k for k in kernels if k.name == mangled]
        spills = ", ".join(f"{k.arch} spills {k.spilled} bytes" for k in same if k.spilled)
        print(f"{shown(mangled):<50} {max(k.registers for k in same):>4} registers  {same[0].shared_bytes:>6} bytes shared  {spills or 'no spills'}")
    if not kernels:
        sys.exit(f"no register report under {path}")
    if any(k.spilled for k in kernels):
        sys.exit("a kernel spills")


if __name__ == "__main__":
    main(sys.argv[1])

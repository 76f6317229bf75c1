"""Registers and spills of every kernel, from the output of a build with -Xptxas -v."""

import re
import shutil
import subprocess
import sys


def main(path: str) -> None:
    """One line a kernel: the most registers over the architectures, and where it spills."""
    kernels: dict[str, dict[str, tuple[int, int]]] = {}
    name = arch = ""
    spilled = 0
    for line in open(path, encoding="utf-8", errors="replace"):
        if found := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            name, arch, spilled = *found.groups(), 0
        elif found := re.search(r"(\d+) bytes spill stores", line):
            spilled = int(found[1])
        elif (found := re.search(r"Used (\d+) registers", line)) and name:
            kernels.setdefault(name, {})[arch] = int(found[1]), spilled
    tool = shutil.which("c++filt")
    for mangled, archs in sorted(kernels.items()):
        shown = subprocess.run([tool, mangled], capture_output=True, text=True).stdout.strip() if tool else mangled
        spills = ", ".join(f"{a} spills {s} bytes" for a, (_, s) in sorted(archs.items()) if s)
        print(f"  {re.sub(r'[(].*', '', shown).removeprefix('void '):<50} {max(r for r, _ in archs.values()):>4} registers  {spills or 'no spills'}")
    if not kernels:
        print("  no register report: the build printed none")


if __name__ == "__main__":
    main(sys.argv[1])

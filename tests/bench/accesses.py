"""What the CUDA kernels' accesses to memory cost, counted over their PTX on the host (kernels/simt/count.h): sectors of global memory, passes
over shared memory, and by line of the source where most are more than there need be. It takes nvcc and no GPU; nothing here is a time.

    python -m tests.bench.accesses [--kv bf16 q8] [--rows 1 64] [--lines 10] [--build FOLDER]
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvrun.backends._abi import ffi

from ..cuda import translated
from ..cuda.device_memory import Device
from ..cuda.machine import CudaMachine, Mirror
from ..kernels import quant_cache
from ..kernels.plans import PAGE, Cache, floats, pointer, poisoned

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 128
TELL = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)


@dataclass(frozen=True)
class Site:
    """One instruction. units: sectors, or passes where it is of shared memory; least: as few as could be."""

    where: str
    shared: bool
    accesses: int
    units: int
    least: int


class Counted:
    """The library that counts."""

    def __init__(self, library: Path) -> None:
        self._lib = ctypes.CDLL(str(library))
        memory = Device(library, gpu=False)
        self.machine = CudaMachine(ffi.dlopen(str(library)), np.random.default_rng(1), lambda: Mirror(memory.fresh().put, memory.bytes))

    def reset(self) -> None:
        self._lib.kv_count_reset()

    def sites(self) -> list[Site]:
        """Since reset()."""
        found: list[Site] = []
        self._lib.kv_count_tell(TELL(lambda where, shared, *counts: found.append(Site(where.decode(), bool(shared), *counts))))
        return found


def attention(counted: Counted, kv: str, length: int, rows: int) -> list[Site]:
    """Of `rows` rows behind `length` tokens, prompt rows if there are several."""
    rng, scale = np.random.default_rng(2), HEAD_DIM**-0.5
    qkv = floats(rng, length + rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    pages = list(range(-(-(length + rows) // PAGE)))
    if kv in ("q8", "q4"):
        cache = quant_cache.QuantCache(len(pages), KV_HEADS, HEAD_DIM, kv, kv)
        sequence = quant_cache.Rows(cache, qkv, HEADS, pages[::-1])
        for positions in quant_cache.chunks(0, length + rows, 64):
            sequence.append(counted.machine, positions)
        counted.reset()
        quant_cache.attend(counted.machine, sequence, sequence.q[length:], range(length, length + rows), prefill=rows > 1, scale=scale)
        return counted.sites()
    cache = Cache(len(pages), KV_HEADS, HEAD_DIM, kv, kv)
    shape = {"cache": cache.fields(), "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    tables = [[(pages, [PAGE * i for i in pages])]]
    for positions in quant_cache.chunks(0, length + rows, 64):
        part = np.ascontiguousarray(qkv[positions.start : positions.stop])
        counted.machine.run([("append", shape | {"qkv": pointer(part)})], pos=positions, tables=tables, prefill=True)
    last, out = np.ascontiguousarray(qkv[length:]), poisoned(rows, HEADS * HEAD_DIM)
    counted.reset()
    counted.machine.run([("attend", shape | {"qkv": pointer(last), "out": pointer(out), "scale": scale})], pos=range(length, length + rows), tables=tables,
                        prefill=rows > 1)
    return counted.sites()


def lines(title: str, sites: list[Site], most: int) -> Iterator[str]:
    """The table of one measurement."""
    for shared, what in ((False, "sectors of global memory"), (True, "passes over shared memory")):
        those = [site for site in sites if site.shared == shared]
        yield f"{title}: {sum(s.units for s in those):>8} {what}, {sum(s.least for s in those)} at least"
    for site in sorted(sites, key=lambda s: s.least - s.units)[:most]:
        if site.units > site.least:
            yield f"  {site.units:>8} of {site.least:>8} {'passes ' if site.shared else 'sectors'}  {site.accesses:>7} accesses  {site.where}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", nargs="*", default=["bf16", "q8", "q4"], choices=["f16", "bf16", "q8", "q4"], metavar="FORMAT")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--length", type=int, default=960, help="tokens before those rows; they lie in one page")
    parser.add_argument("--lines", type=int, default=8)
    parser.add_argument("--build", type=Path, help="keeps the build, or takes the one that is there")
    options = parser.parse_args()
    nvcc = translated.compiler()
    if not nvcc:
        sys.exit("no nvcc: set CUDACXX, or put it on the path")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.build or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        made = translated.Build(nvcc, "c++", folder, count=True)
        counted = Counted(made.library if made.library.exists() else made.whole())
        for kv in options.kv:
            for rows in options.rows:
                print(*lines(f"{kv:<5}{rows:>3} rows", attention(counted, kv, options.length, rows), options.lines), sep="\n", flush=True)


if __name__ == "__main__":
    main()

"""What the benchmark scripts share: plain steps through an opened engine, resident memory, the machine in words."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

from kvrun.backends.batch import Batch, Sampler


class Steps:
    """Rows through an engine's executor, timed. Greedy; an end-of-sequence token does not stop it."""

    def __init__(self, engine) -> None:
        self.engine = engine

    def clear(self) -> None:
        """Empties the cache."""
        self.engine.sequence.clear()
        self.engine.tokens.clear()

    def prefill(self, ids: list[int]) -> tuple[int, float]:
        """Appends prompt rows in the engine's chunks; only the last gives logits. (drawn token, seconds)."""
        engine, drawn = self.engine, []
        started = time.perf_counter()
        for at in range(0, len(ids), engine.chunk):
            part = ids[at : at + engine.chunk]
            drawn = self._step(part, prefill=True, out_rows=[len(part) - 1] if at + len(part) == len(ids) else [])
        return drawn[0], time.perf_counter() - started

    def decode(self, token: int, n: int) -> float:
        """n single steps from `token`, each fed what the last drew. Seconds."""
        started = time.perf_counter()
        for _ in range(n):
            token = self._step([token], prefill=False, out_rows=[0])[0]
        return time.perf_counter() - started

    def _step(self, part: list[int], *, prefill: bool, out_rows: list[int]) -> list[int]:
        sequence = self.engine.sequence
        first = sequence.length
        sequence.extend(len(part))
        return self.engine.executor.step(Batch(
            tokens=part, positions=list(range(first, first + len(part))), prefill=prefill, out_rows=out_rows,
            tables=[[table] for table in sequence.tables()], sampler=Sampler() if out_rows else None))


def rss_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def read_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` cores read together from memory larger than any cache."""
    from kvrun.backends.memory import Arena
    from kvrun.backends.native import ffi, lib

    arena = Arena(512 * 2**20, "a bandwidth measurement")
    rate = lib.kv_cpu_read_bandwidth(ffi.cast("void *", arena.address), arena.n_bytes, threads, 5)
    arena.close()
    return rate


def decode_bytes(files, plan, depth: int, weights: str = "auto") -> int:
    """Bytes that one decode step at `depth` must read: every matrix but a lookup-only embedding, and K and V in view."""
    from kvrun.cache.formats import resolve_kv
    from kvrun.models import load_spec, tensor_refs
    from kvrun.weights import load, open_source

    spec = load_spec(files.config, str(files.path))
    source = open_source(files)
    multiplied = {op.fields["w"].name for op in plan.ops if op.kind == "linear"}
    packed = load.layout(plan, source, tensor_refs(spec, files.config, files.kind), weights)
    source.close()
    weights = sum(p.n_bytes for p in packed if p.weight.name in multiplied)
    bits = sum({"f32": 32}.get(name, 16) for name in resolve_kv("f16", spec.dtype))
    cache = sum(len(g.layers) * g.kv_heads * g.head_dim * bits // 8 * min(depth, g.window or depth) for g in plan.groups)
    return weights + cache


def machine() -> dict[str, object]:
    """CPU, cores and load of this machine."""
    name = platform.processor()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return {"cpu": name, "cores": os.cpu_count(), "load": os.getloadavg()[0]}

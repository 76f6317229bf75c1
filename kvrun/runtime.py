"""Opens a model for generation: spec, plan, memory check, cache, weights, text and engine, in that order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvrun.cache.formats import PAGE, resolve_kv
from kvrun.cache.planner import MemoryPlan, available_memory, cache_bytes, check_fits
from kvrun.errors import UsageError

if TYPE_CHECKING:
    from kvrun.engine import Engine
    from kvrun.hub.files import ModelFiles
    from kvrun.text import Text

DEFAULT_N_CTX = 8192
"""n_ctx when neither the user nor the alias says: this, or the trained length where that is less."""

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""


class _Background:
    """A call that runs in a thread of its own; result() waits and raises what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._value: object = None
        self._error: BaseException | None = None
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            self._error = error

    def result(self) -> object:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value


def choose_device(device: str, notify: Callable[[str], None]) -> str:
    """auto | cpu | cuda | reference -> the executor to use. Raises KvrunError where what was named cannot be had;
    `auto` without native kernels is the reference executor, said aloud."""
    if device == "cuda":
        from kvrun.backends.cuda import require

        require()
    if device in ("cpu", "reference", "cuda"):
        return device
    if device == "auto":
        from kvrun.errors import KvrunError

        try:
            import kvrun.backends.native  # noqa: F401 - loads the library
        except KvrunError as error:
            notify(f"{error}; using the slow reference executor")
            return "reference"
        return "cpu"
    raise UsageError(f"--device {device}: choose auto, cpu, cuda or reference")


def open_engine(files: ModelFiles, *, device: str = "auto", n_ctx: int | None = None, kv: str = "f16",
                threads: int | None = None, max_out: int = 1, prefill_chunk: int = 512,
                progress: Progress | None = None, notify: Callable[[str], None] = lambda text: None) -> Engine:
    """An Engine over the model in `files`, with everything allocated.

    n_ctx: tokens of context; None is the alias' value, else min(trained length, 8192). kv: cache format.
    max_out: rows of a step that can give logits. notify: told what the user must know. Errors: ModelError, OutOfMemoryError, UsageError.
    """
    device = choose_device(device, notify)
    text = _Background(lambda: _load_text(files))
    try:
        return _open(files, text, device, n_ctx, kv, threads, max_out, prefill_chunk, progress, notify)
    except BaseException:
        text._thread.join()  # let it end before its error or result is dropped
        raise


def _load_text(files: ModelFiles) -> Text:
    from kvrun.text import load_text

    return load_text(files)


def _open(files: ModelFiles, text: _Background, device: str, n_ctx: int | None, kv: str, threads: int | None,
          max_out: int, prefill_chunk: int, progress: Progress | None, notify: Callable[[str], None]) -> Engine:
    from kvrun.cache.pool import Pool
    from kvrun.engine import Engine
    from kvrun.models import build_plan, check_tensors, load_spec, tensor_refs
    from kvrun.weights import open_source
    from kvrun.weights.key_bias import choose_formats

    where = str(files.path)
    spec = load_spec(files.config, where)
    n_ctx = n_ctx or files.n_ctx or min(spec.n_positions, DEFAULT_N_CTX)
    if n_ctx < 1:
        raise UsageError(f"--n-ctx {n_ctx}: must be at least 1")
    if n_ctx > spec.n_positions:
        raise UsageError(f"--n-ctx {n_ctx}: {files.name} was trained for {spec.n_positions} positions; use at most that")
    spec = load_spec(files.config, where, n_ctx=n_ctx)
    resolve_kv(kv, spec.dtype)  # a format that does not exist is refused before a file is opened
    if prefill_chunk < 1 or max_out < 1:
        raise UsageError("the prefill chunk and the number of output rows must be at least 1")
    source = open_source(files)
    try:
        refs = tensor_refs(spec, files.config, files.kind)
        check_tensors(spec, refs, source)
        formats, told = choose_formats(kv, spec, refs, source)
        if told:
            notify(told)
        # No step spans two pages that are quantized whole, so no buffer need hold more rows.
        chunk = min(prefill_chunk, n_ctx, PAGE if "q4" in formats else n_ctx)
        plan = build_plan(spec, max_rows=max(chunk, max_out), max_out=max_out)

        def report(done: int, total: int) -> None:
            if progress:
                progress("loading", done, total)

        def pool() -> Pool:
            return Pool(plan.groups, n_ctx=n_ctx, chunk=plan.max_rows, kv=formats)

        def cache_plan(weights: int, workspace: Callable[[int], int]) -> Callable[[int], MemoryPlan]:
            def plan_for(n: int) -> MemoryPlan:
                return MemoryPlan(n, weights, cache_bytes(plan.groups, n_ctx=n, chunk=plan.max_rows, kv=formats), workspace(n))
            return plan_for

        if device == "reference":
            weights = 4 * sum(w.n * w.k for w in plan.weights)
            check_fits(cache_plan(weights, lambda n: plan.buffer_bytes()), n_ctx, available_memory())
            from kvrun.backends.reference import ReferenceExecutor

            memory = pool()
            executor = ReferenceExecutor(plan, source, refs, memory)
        else:
            executor, memory = _open_cpu(plan, source, refs, pool, cache_plan, n_ctx, threads, report, formats)
    finally:
        source.close()
    try:
        return Engine(spec, executor, memory.sequence(), text.result(), n_ctx=n_ctx, chunk=chunk)
    except BaseException:
        executor.close()
        raise


def _open_cpu(plan, source, refs, make_pool, cache_plan, n_ctx, threads, report, kv):
    """The CPU executor and its pool, after the memory check."""
    from kvrun.backends.cpu import CpuExecutor, best_isa, default_threads, scratch_bytes
    from kvrun.backends.memory import Arena
    from kvrun.cache.formats import PAGE
    from kvrun.weights import load

    threads = default_threads() if threads is None else threads
    if not 1 <= threads <= 256:
        raise UsageError(f"--threads {threads}: must be from 1 to 256")
    packed = load.layout(plan, source, refs)
    n_weights = load.weight_bytes(packed)

    def workspace(n: int) -> int:
        return plan.buffer_bytes() + scratch_bytes(plan, max_pages=-(-n // PAGE), threads=threads, isa=best_isa(), kv=kv)

    check_fits(cache_plan(n_weights, workspace), n_ctx, available_memory())
    cache = _Background(make_pool)  # clearing the cache's memory goes on beside reading the weights
    arena = None
    try:
        arena = Arena(n_weights, "the weights")
        load.pack(packed, arena, source, refs, threads, report)
        vectors = {v.name: load.read_vector(v, source, refs) for v in plan.vectors}
    except BaseException:
        cache.result().close()
        raise
    weights = {p.weight.name: (arena.address + p.offset, p.dtype) for p in packed}
    memory = cache.result()
    return CpuExecutor(plan, weights, vectors, memory, threads=threads, owned=(arena,)), memory



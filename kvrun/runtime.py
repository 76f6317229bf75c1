"""Opens a model for generation: spec, plan, memory check, cache, weights, text and engine, in that order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvrun.blueprint import Blueprint, Shape
from kvrun.cache.planner import check_fits
from kvrun.errors import UsageError

if TYPE_CHECKING:
    from kvrun.backends.executor import Executor
    from kvrun.backends.plan import Plan
    from kvrun.cache.pool import Pool
    from kvrun.engine import Engine
    from kvrun.hub.files import ModelFiles
    from kvrun.text import Text

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
    """auto | cpu | cuda | reference | simt -> the executor to use. Raises KvrunError where what was named cannot be had;
    `auto` is cuda where there is a device, and says so, or why it cannot be used; without native kernels it is the
    reference executor, said aloud."""
    if device == "cuda":
        from kvrun.backends.cuda import require

        require()
    if device in ("cpu", "reference", "cuda", "simt"):
        return device
    if device == "auto":
        from kvrun.errors import KvrunError

        try:
            import kvrun.backends.native  # noqa: F401 - loads the library
        except KvrunError as error:
            notify(f"{error}; using the slow reference executor")
            return "reference"
        from kvrun.backends.cuda import probe, why_not

        status = probe()
        if status.absent:
            return "cpu"
        reason = why_not(status)
        notify(f"the GPU is not used: {reason}" if reason else f"using the GPU, {status.devices[0].name}")
        return "cpu" if reason else "cuda"
    raise UsageError(f"--device {device}: choose auto, cpu, cuda or reference")


def open_engine(files: ModelFiles, *, device: str = "auto", n_ctx: int | str | None = None, kv: str = "f16",
                threads: int | None = None, max_out: int = 1, prefill_chunk: int = 512, weights: str = "auto",
                progress: Progress | None = None, notify: Callable[[str], None] = lambda text: None) -> Engine:
    """An Engine over the model in `files`, with everything allocated.

    n_ctx: tokens of context; "max" is what fits; None is the alias' value, else min(trained length, 8192). kv: cache
    format. max_out: rows of a step that can give logits. weights: "auto", or at most "bf16", "q8", "q4". notify: told
    what the user must know. Errors: ModelError, OutOfMemoryError, UsageError.
    """
    device = choose_device(device, notify)
    with Blueprint(files, Shape(device, threads, max_out, prefill_chunk, weights)) as blueprint:
        return _open(blueprint, n_ctx, kv, progress, notify)


def _load_text(files: ModelFiles) -> Text:
    from kvrun.text import load_text

    return load_text(files)


def _open(blueprint: Blueprint, wanted: int | str | None, kv: str, progress: Progress | None, notify: Callable[[str], None]) -> Engine:
    from kvrun.engine import Engine

    n_ctx = blueprint.choose_n_ctx(wanted, kv)
    if wanted == "max":
        notify(f"n_ctx {n_ctx}" + (", the trained length" if n_ctx == blueprint.spec.n_positions else ", the largest that fits"))
    plan = blueprint.plan(n_ctx)

    def report(done: int, total: int) -> None:
        if progress:
            progress("loading", done, total)

    told = blueprint.format_notice(kv)
    if told:
        notify(told)
    check_fits(blueprint.planner(kv), n_ctx, blueprint.available())
    opens = {"reference": _open_reference, "cpu": _open_cpu, "cuda": _open_cuda, "simt": _open_cuda}
    # Begun this late, it meets reading the weights, which leaves the interpreter alone, and not the Python before it.
    text = _Background(lambda: _load_text(blueprint.files))
    try:
        executor, pool = opens[blueprint.shape.device](blueprint, plan, n_ctx, kv, report, notify)
    except BaseException:
        text._thread.join()  # let it end before its error or result is dropped
        raise
    try:
        return Engine(blueprint.spec, executor, pool.sequence(), text.result(), n_ctx=n_ctx,
                      chunk=min(blueprint.shape.prefill_chunk, n_ctx), pool=pool)
    except BaseException:
        executor.close()
        raise


def make_pool(blueprint: Blueprint, plan: Plan, n_ctx: int, kv: str) -> Pool:
    """The cache's memory: blueprint.memory(kv, n_ctx).cache bytes."""
    from kvrun.cache.pool import Pool

    return Pool(plan.groups, n_ctx=n_ctx, chunk=plan.max_rows, kv=blueprint.formats(kv))


def _open_reference(blueprint: Blueprint, plan: Plan, n_ctx: int, kv: str, report: Callable[[int, int], None],
                    notify: Callable[[str], None]) -> tuple[Executor, Pool]:
    from kvrun.backends.reference import ReferenceExecutor

    pool = make_pool(blueprint, plan, n_ctx, kv)
    return ReferenceExecutor(plan, blueprint.source, blueprint.refs, pool), pool


def _open_cpu(blueprint: Blueprint, plan: Plan, n_ctx: int, kv: str, report: Callable[[int, int], None],
              notify: Callable[[str], None]) -> tuple[Executor, Pool]:
    from kvrun.backends.cpu import CpuExecutor
    from kvrun.weights.loaded import LoadedWeights

    cache = _Background(lambda: make_pool(blueprint, plan, n_ctx, kv))  # clearing its memory goes on beside reading the weights
    try:
        weights = LoadedWeights.read(blueprint.packed, plan, blueprint.source, blueprint.refs, blueprint.threads, report, notify)
    except BaseException:
        cache.result().close()
        raise
    pool = cache.result()
    return CpuExecutor(plan, weights.matrices, weights.vectors, pool, threads=blueprint.threads, owned=(weights,)), pool


def _open_cuda(blueprint: Blueprint, plan: Plan, n_ctx: int, kv: str, report: Callable[[int, int], None],
               notify: Callable[[str], None]) -> tuple[Executor, Pool]:
    from kvrun.backends.cuda import open_device
    from kvrun.backends.cuda_executor import CudaExecutor
    from kvrun.cache.pool import Pool
    from kvrun.weights.on_device import DeviceWeights

    device = open_device(blueprint.shape.device)
    taken = []
    try:
        # The cache first: it is the largest single piece, and what does not fit is known before a weight is read.
        pool = Pool(plan.groups, n_ctx=n_ctx, chunk=plan.max_rows, kv=blueprint.formats(kv), allocate=device.allocate)
        taken.append(pool)
        weights = DeviceWeights.read(blueprint.packed, plan, blueprint.source, blueprint.refs, blueprint.threads, device, report)
        taken.append(weights)
        return CudaExecutor(plan, weights.matrices, weights.vectors, pool, device, owned=(weights, device)), pool
    except BaseException:
        for memory in (*taken, device):
            memory.close()
        raise

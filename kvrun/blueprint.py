"""What opening a model will take, from its headers alone: spec, plan, packed sizes and memory, before a weight is read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrun.cache.planner import DEFAULT_HEADROOM, MemoryPlan, available_memory, largest_n_ctx, pool_layouts, resident_memory, usable
from kvrun.errors import OutOfMemoryError, UsageError

if TYPE_CHECKING:
    from kvrun.backends.plan import Plan
    from kvrun.hub.files import ModelFiles
    from kvrun.models.spec import ModelSpec
    from kvrun.weights.load import PackedWeight

DEFAULT_N_CTX = 8192
"""n_ctx when neither the user nor the alias says: this, or the trained length where that is less."""
DEFAULT_CHUNK = 512
"""The most prompt rows of a step."""
_TO_COME = {"cpu": 33 << 20, "simt": 33 << 20, "reference": 290 << 20}
"""What a process takes beside its tensors and its tokenizer after a Blueprint is made, by device: libraries that are loaded
later (torch for reference), threads, buffers to read through. Measured with `kvrun run` and `chat` on Linux."""


@dataclass(frozen=True)
class Shape:
    """How a model is to be run. max_out: rows of a step that can give logits. prefill_chunk: the most rows of a step.
    weights: one of kvrun.weights.load.WEIGHTS."""

    device: str
    threads: int | None = None
    max_out: int = 1
    prefill_chunk: int = DEFAULT_CHUNK
    weights: str = "auto"


class Blueprint:
    """A model that could be opened. Holds the weight files open until close(); reads their headers alone.

    Of a model of kind "config" nothing but config.json is here: its matrices are taken to be of the config's dtype.
    """

    def __init__(self, files: ModelFiles, shape: Shape) -> None:
        """shape.device: cpu, cuda, simt or reference. Errors: ModelError, UsageError."""
        from kvrun.models import check_tensors, load_spec, tensor_refs
        from kvrun.weights import open_source

        if shape.prefill_chunk < 1 or shape.max_out < 1:
            raise UsageError("the prefill chunk and the number of output rows must be at least 1")
        if shape.weights != "auto" and shape.device == "reference":
            raise UsageError(f"--weights {shape.weights}: the reference executor computes with the weights as they are; leave it out")
        self._resident = resident_memory()
        self.files = files
        self.shape = shape
        self.spec: ModelSpec = load_spec(files.config, str(files.path))
        self.threads = 1
        if shape.device != "reference":
            from kvrun.backends.cpu import default_threads

            self.threads = default_threads() if shape.threads is None else shape.threads
            if not 1 <= self.threads <= 256:
                raise UsageError(f"--threads {self.threads}: must be from 1 to 256")
        self.source = None
        self.refs = {}
        if files.kind != "config":
            self.source = open_source(files)
            try:
                self.refs = tensor_refs(self.spec, files.config, files.kind)
                check_tensors(self.spec, self.refs, self.source, str(files.path))
            except BaseException:
                self.source.close()
                raise
        self._plans: dict[int, Plan] = {}
        self._formats: dict[str, tuple[tuple[str, str], str | None]] = {}

    def close(self) -> None:
        """Closes the weight files. Idempotent."""
        if self.source is not None:
            self.source.close()

    def __enter__(self) -> Blueprint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- plans and sizes ----

    def rows(self, n_ctx: int) -> int:
        """Rows of a step's buffers in a context of n_ctx tokens."""
        return max(min(self.shape.prefill_chunk, n_ctx), self.shape.max_out)

    def plan(self, n_ctx: int) -> Plan:
        """The plan for a context of n_ctx tokens, which also chooses between LongRoPE's factors."""
        from kvrun.models import build_plan, load_spec

        spec = load_spec(self.files.config, str(self.files.path), n_ctx=n_ctx)
        return build_plan(spec, max_rows=self.rows(n_ctx), max_out=self.shape.max_out)

    def _sized_plan(self, n_ctx: int) -> Plan:
        """A plan of the same sizes as plan(n_ctx); kept, because a search asks for many."""
        rows = self.rows(n_ctx)
        if rows not in self._plans:
            self._plans[rows] = self.plan(n_ctx)
        return self._plans[rows]

    @functools.cached_property
    def packed(self) -> list[PackedWeight]:
        """Where every matrix will lie, and in which format (cpu)."""
        from kvrun.weights import load

        plan = self._sized_plan(1)
        if self.source is not None:
            return load.layout(plan, self.source, self.refs, self.shape.weights)
        dtype = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[self.spec.dtype]
        return load.layout_as(plan, lambda weight: load.smaller(weight, dtype, self.shape.weights))

    @functools.cached_property
    def weight_bytes(self) -> int:
        """Bytes of all matrices and vectors in memory."""
        plan = self._sized_plan(1)
        vectors = sum(4 * v.dim for v in plan.vectors)
        if self.shape.device == "reference":
            return vectors + sum(4 * w.n * w.k for w in plan.weights)
        from kvrun.weights import load

        return vectors + load.weight_bytes(self.packed)

    @functools.cached_property
    def read_bytes(self) -> int:
        """Bytes of weights that one decode step reads: every matrix of a linear map. An embedding that is not also
        the head costs one row, which is left out."""
        plan = self._sized_plan(1)
        used = {op.fields["w"].name for op in plan.ops if op.kind == "linear"}
        if self.shape.device == "reference":
            return sum(4 * w.n * w.k for w in plan.weights if w.name in used)
        return sum(p.n_bytes for p in self.packed if p.weight.name in used)

    # ---- memory ----

    def formats(self, kv: str) -> tuple[str, str]:
        """Storage formats of K and V under --kv. UsageError for what is none, or that this model's heads do not fit."""
        return self._choice(kv)[0]

    def format_notice(self, kv: str) -> str | None:
        """What the user must be told of formats(kv): that K stays at 8 bits, or nothing."""
        return self._choice(kv)[1]

    def _choice(self, kv: str) -> tuple[tuple[str, str], str | None]:
        from kvrun.weights.key_bias import choose_formats

        if kv not in self._formats:
            self._formats[kv] = choose_formats(kv, self.spec, self.refs, self.source)
        return self._formats[kv]

    def layouts(self, kv: str, n_ctx: int) -> list:
        """GroupLayout of each layer group in a context of n_ctx tokens."""
        plan = self._sized_plan(n_ctx)
        return pool_layouts(plan.groups, n_ctx=n_ctx, chunk=plan.max_rows, kv=self.formats(kv))

    def memory(self, kv: str, n_ctx: int) -> MemoryPlan:
        """Everything that opening takes; weights, cache and workspace to the byte."""
        layouts = self.layouts(kv, n_ctx)
        return MemoryPlan(n_ctx, self.weight_bytes, sum(layout.n_bytes for layout in layouts),
                          self._workspace(n_ctx, max(layout.n_pages for layout in layouts), self.formats(kv)), self.program_bytes)

    @functools.cached_property
    def program_bytes(self) -> int:
        """About what the process will have beside its tensors, where they lie in the same memory: 0 for cuda."""
        if self.shape.device == "cuda":
            return 0
        from kvrun.text import memory_bytes

        return self._resident + _TO_COME[self.shape.device] + memory_bytes(self.files, self.spec.vocab_size)

    def _workspace(self, n_ctx: int, max_pages: int, kv: tuple[str, str]) -> int:
        plan = self._sized_plan(n_ctx)
        if self.shape.device == "reference":
            return plan.buffer_bytes()
        if self.shape.device in ("cuda", "simt"):
            from kvrun.backends import cuda, cuda_executor

            return cuda_executor.work_bytes(plan, cuda.library_of(self.shape.device), max_pages=max_pages, kv=kv,
                                            products=self.shape.device == "cuda")
        from kvrun.backends.cpu import work_bytes

        return work_bytes(plan, max_pages=max_pages, threads=self.threads, kv=kv)

    def available(self) -> int | None:
        """Bytes that there are for the model and this process: the GPU's, or the system's. None: unknown."""
        if self.shape.device == "cuda":
            from kvrun.backends.cuda import free_memory

            return free_memory()
        return available_memory()

    def planner(self, kv: str) -> Callable[[int], MemoryPlan]:
        """n_ctx -> memory(kv, n_ctx)."""
        return lambda n_ctx: self.memory(kv, n_ctx)

    def choose_n_ctx(self, wanted: int | str | None, kv: str, headroom: float = DEFAULT_HEADROOM) -> int:
        """The n_ctx to use. wanted: a number, "max" for the largest that fits, or None for the default.

        UsageError for one that the model was not trained for, OutOfMemoryError when "max" finds none.
        """
        trained = self.spec.n_positions
        if wanted == "max":
            limit = usable(self.available(), headroom)
            found = trained if limit is None else largest_n_ctx(self.planner(kv), limit, trained)
            if not found:
                raise OutOfMemoryError(f"{self.files.name} does not fit into {limit / 2**20:.0f} MiB with any n_ctx; choose a smaller model")
            return found
        n_ctx = min(self.files.n_ctx or DEFAULT_N_CTX, trained) if wanted is None else int(wanted)
        if n_ctx < 1:
            raise UsageError(f"--n-ctx {n_ctx}: must be at least 1")
        if n_ctx > trained:
            raise UsageError(f"--n-ctx {n_ctx}: {self.files.name} was trained for {trained} positions; use at most that")
        return n_ctx

"""Matrix products of many rows through torch (cuBLAS on a GPU). The only place beside cuda_torch.py that imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvrun.backends.cuda_device import check
from kvrun.backends.native import DTYPES, ffi
from kvrun.backends.plan import Plan

if TYPE_CHECKING:
    import torch

MIN_ROWS = 16
"""With fewer rows the library's own kernel is used, which reads the packed weights only once in so many rows."""
_PANEL_BYTES = 64 << 20
_NAMES = {number: name for name, number in DTYPES.items()}


def _panel_rows(n: int, k: int) -> int:
    return max(16, min(-(-n // 16) * 16, _PANEL_BYTES // (4 * k) // 16 * 16))


def work_bytes(plan: Plan) -> int:
    """Bytes that products of this plan take of torch's allocator for as long as they run."""
    most = 0
    for weight in plan.weights:
        panel = _panel_rows(weight.n, weight.k)
        most = max(most, 4 * panel * weight.k + 4 * plan.max_rows * (weight.k + 2 * panel))
    return most


class Product:
    """y = x W^T for float32 tensors x and y and packed W, a panel of W's rows at a time.

    W becomes a dense panel of its own 16-bit format (bfloat16 for quantized ones, float32 for float32), x is rounded to
    the same, sums are float32.
    """

    def __init__(self, lib: Any, stream: int) -> None:
        self._lib, self._stream = lib, stream

    def __call__(self, weight: Any, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None, *, scale: float, softcap: float, accumulate: bool) -> None:
        """weight: kv_weight. x: [rows][k]. out: [rows][n]. bias: [n] or None. The rest is that of kv_op_linear."""
        import torch

        kind = _NAMES[weight.dtype]
        dtype, stored = {"f32": (torch.float32, "f32"), "f16": (torch.float16, "f16")}.get(kind, (torch.bfloat16, "bf16"))
        narrow = x.to(dtype)
        n, k = weight.n, weight.k
        step = _panel_rows(n, k)
        panel = torch.empty(min(step, n), k, dtype=dtype, device=x.device)
        for row in range(0, n, step):
            rows = min(step, n - row)
            to = ffi.cast("void *", panel.data_ptr())
            check(self._lib, self._lib.kv_cuda_unpack(ffi.addressof(weight), row, rows, to, DTYPES[stored], self._stream))
            target = out[:, row : row + rows]
            y = torch.empty_like(target) if accumulate else target
            if dtype == torch.float32:
                torch.mm(narrow, panel[:rows].t(), out=y)
            elif x.is_cuda:
                torch.mm(narrow, panel[:rows].t(), out_dtype=torch.float32, out=y)
            else:  # torch has no such product on a CPU
                torch.mm(narrow.float(), panel[:rows].float().t(), out=y)
            if bias is not None:
                y += bias[row : row + rows]
            if softcap > 0:
                y.mul_(scale / softcap).tanh_().mul_(softcap)
            elif scale != 1.0:
                y.mul_(scale)
            if accumulate:
                target += y

"""What `kvrun verify` looks at: every kind that is handed out as it lies, quantized by the reference implementation."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from kvrun.hub.verify import _finite
from kvrun.weights.source import DTYPES

SCALES = {"q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q8_0": [0], "q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208]}
"""Where the 16-bit scales of a block lie (ggml-common.h)."""


@pytest.mark.parametrize("kind", DTYPES)
def test_nan_and_inf_are_found(kind):
    block, size = {"f32": (1, 4), "f16": (1, 2), "bf16": (1, 2)}.get(kind) or quants.GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
    data = np.zeros((4, size), np.uint8)
    data[:] = np.arange(size) % 0x3C                  # no integer of a block is looked at
    assert _finite(kind, data.reshape(-1))
    exponent = {"f32": b"\0\0\x80\x7f", "bf16": b"\x80\x7f"}.get(kind, b"\0\x7c")
    for at in SCALES.get(kind, [0]):
        wrong = data.copy()
        wrong[2, at : at + len(exponent)] = np.frombuffer(exponent, np.uint8)
        assert not _finite(kind, wrong.reshape(-1))

"""Writing small weight files, and reading damaged ones."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest

from kvrun.errors import ModelError


@contextmanager
def read_or_refused(most: int) -> Iterator[None]:
    """What is read inside is read, or refused in one line; Python allocates less than `most` bytes at a time for it."""
    tracemalloc.start()
    try:
        yield
    except ModelError as error:
        assert "\n" not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < most


@pytest.fixture
def write_gguf(tmp_path):
    """Writes a GGUF: write_gguf(metadata, tensors, arch). metadata: key -> value, typed by Python's types (float is
    f32, int is u32, a list of bool/int/float/str an array). tensors: name -> array, or (raw bytes [rows][n], type)."""
    def write(metadata: dict, tensors: dict, arch: str = "llama", name: str = "model.gguf") -> Path:
        path = tmp_path / name
        w = gguf.GGUFWriter(path, arch)
        for key, value in metadata.items():
            if isinstance(value, bool):
                w.add_bool(key, value)
            elif isinstance(value, int):
                w.add_uint32(key, value)
            elif isinstance(value, float):
                w.add_float32(key, value)
            elif isinstance(value, str):
                w.add_string(key, value)
            else:
                w.add_array(key, value)
        for tensor, data in tensors.items():
            if isinstance(data, tuple):
                w.add_tensor(tensor, data[0], raw_dtype=data[1])
            else:
                w.add_tensor(tensor, data)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        return path

    return write


@pytest.fixture
def draw():
    """Random numbers, new each time; the seed shows up when a test fails."""
    seed = int(np.random.SeedSequence().entropy % 2**32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)

"""Devices for the CUDA sources: the emulator everywhere, a GPU where there is one."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from .device_memory import Device

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.fixture(scope="session")
def cxx() -> str:
    """A C++ compiler."""
    found = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if not found:
        pytest.skip("no C++ compiler to build the emulator with")
    return found


@pytest.fixture(scope="session")
def simt_library(cxx: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of kernels/cuda, compiled for the host."""
    library = tmp_path_factory.mktemp("simt") / "libkvrun_simt.so"
    sources = [*sorted((KERNELS / "cuda").glob("*.cu")), KERNELS / "cuda/step.cpp", KERNELS / "simt/simt.cpp"]
    subprocess.run([cxx, "-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-DKVRUN_SIMT", "-x", "c++",
                    *map(str, sources), "-o", str(library)], check=True)
    return library


@pytest.fixture(params=["simt", "gpu"])
def device(request: pytest.FixtureRequest) -> Device:
    """Where the kernels run."""
    if request.param == "simt":
        return Device(request.getfixturevalue("simt_library"), gpu=False)
    from kvrun.backends.cuda import probe

    status = probe()
    if not status.devices:
        pytest.skip(f"no GPU: {status.reason}")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return Device(status.path, gpu=True)


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers drawn anew; the seed is shown with a failure."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)

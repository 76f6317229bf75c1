"""Devices for the CUDA sources: the emulator everywhere, what nvcc makes of them where it is at hand, a GPU where there is one."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from . import translated
from .device_memory import Device
from .emulator import build
from .machine import CudaMachine, Mirror

if TYPE_CHECKING:
    from kvrun.engine.engine import Engine


@pytest.fixture(scope="session")
def cxx() -> str:
    """A C++ compiler."""
    found = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if not found:
        pytest.skip("no C++ compiler to build the emulator with")
    return found


@pytest.fixture(scope="session")
def simt_library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of kernels/cuda, compiled for the host; KVRUN_SIMT_LIBRARY names one that was built before."""
    built = os.environ.get("KVRUN_SIMT_LIBRARY")
    return Path(built) if built else build(request.getfixturevalue("cxx"), tmp_path_factory.mktemp("simt"))


@pytest.fixture(scope="session")
def ptx_build(cxx: str, tmp_path_factory: pytest.TempPathFactory) -> translated.Build:
    """libkvrun_cuda with its PTX translated to the host, built."""
    nvcc = translated.compiler()
    if not nvcc:
        pytest.skip("no nvcc")
    made = translated.Build(nvcc, cxx, tmp_path_factory.mktemp("ptx"))
    made.whole()
    return made


def _kinds() -> list[str]:
    from kvrun.backends.cuda import probe

    return ["simt", "gpu"] if probe().devices else ["simt"]


def _kinds_with_ptx() -> list[str]:
    return [*_kinds(), *(["ptx"] if translated.compiler() else [])]


def _device(request: pytest.FixtureRequest) -> Device:
    """Of the kind that the test's parameter names."""
    if request.param == "gpu":
        return Device(_gpu_library(), gpu=True)
    return Device(request.getfixturevalue("simt_library") if request.param == "simt" else request.getfixturevalue("ptx_build").library, gpu=False)


def _gpu_library() -> Path:
    from kvrun.backends.cuda import probe

    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    torch.cuda.init()
    return probe().path


@pytest.fixture(params=_kinds_with_ptx())
def device(request: pytest.FixtureRequest) -> Device:
    """Where the kernels run, with memory of its own."""
    return _device(request)


@pytest.fixture(params=_kinds_with_ptx())
def machine(request: pytest.FixtureRequest, rng: np.random.Generator) -> CudaMachine:
    """Where the kernels run. On the host threads and blocks take turns in an order drawn anew."""
    from kvrun.backends._abi import ffi

    memory = _device(request)
    if request.param != "gpu":
        set_order(memory.path, int(rng.choice([0, 1, rng.integers(2, 2**31)])))
    return CudaMachine(ffi.dlopen(str(memory.path)), rng, lambda: Mirror(memory.fresh().put, memory.bytes))


@pytest.fixture(params=_kinds())
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> str:
    """A --device whose executor is the CUDA one: simt, with the library built here, or cuda."""
    if request.param == "gpu":
        _gpu_library()
        return "cuda"
    from kvrun.backends import simt

    library = request.getfixturevalue("simt_library")
    monkeypatch.setattr(simt, "LIBRARY", library)
    set_order(library, int(rng.choice([0, 1, rng.integers(2, 2**31)])))
    return "simt"


@pytest.fixture
def open_tiny(tmp_path: Path, rng: np.random.Generator, executor: str) -> Iterator[Callable[..., Engine]]:
    """open_tiny(device, kv, dim=..., ...) -> Engine over one random model of each shape. device "cuda": the CUDA executor, on what this
    test runs on."""
    from kvrun.hub import resolve
    from kvrun.runtime import open_engine

    from ..engine.tiny_model import random_model

    opened: list[Engine] = []

    def open_(device: str, kv: str = "f32", *, layers: int = 1, dim: int = 32, window: int = 0, **settings: object) -> Engine:
        folder = tmp_path / f"tiny-{layers}-{dim}-{window}"
        if not folder.exists():
            random_model(folder, int(rng.integers(2**31)), layers=layers, dim=dim, window=window)
        usual = {"device": executor if device == "cuda" else device, "n_ctx": 512, "kv": kv, "threads": 1, "max_out": 16, "prefill_chunk": 16}
        engine = open_engine(resolve(str(folder)), **(usual | settings))
        opened.append(engine)
        return engine

    yield open_
    for engine in opened:
        engine.close()


def set_order(library: Path, order: int) -> None:
    """In which order the emulator's threads take turns: see kv_simt_order in kernels/simt/simt.cpp."""
    print(f"order {order}")
    ctypes.CDLL(str(library)).kv_simt_order(ctypes.c_uint32(order))


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers drawn anew; the seed is shown with a failure."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)

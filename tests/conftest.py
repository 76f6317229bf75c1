"""What every test shares: the two small real models, fetched into the local store on first use."""

from __future__ import annotations

import functools
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings

# Processes that tests start must find the installed kvrun, not the sources of the folder they are started in.
os.environ["PYTHONSAFEPATH"] = "1"
# A background job ignores SIGINT, and so would every process that it starts; Ctrl-C is tested here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# An example may take as long as a busy machine makes it.
settings.register_profile("kvrun", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvrun")


@functools.cache
def _status():
    from kvrun.backends.cuda import probe

    return probe()


@pytest.fixture(scope="module", autouse=True)
def the_cpu_unless_told(request) -> Iterator[None]:
    """Commands and engines that are given no device take the CPU also on a machine with a GPU: what most tests say is of the CPU. Those of
    tests/cuda and tests/engine see the GPU."""
    if request.path.parent.name in ("cuda", "engine") or not _status().devices:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")                 # of processes that tests start; this one has asked the driver already
        hidden = replace(_status(), devices=(), reason="no CUDA-capable device is detected")
        patch.setattr("kvrun.backends.cuda.probe", lambda *args, **settings: hidden)
        yield


@pytest.fixture
def rng():
    """Random inputs; pytest shows the seed when the test fails."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture(scope="session")
def smollm2():
    """ModelFiles of SmolLM2-135M Instruct (Q4_1 GGUF)."""
    from kvrun.hub import resolve

    return resolve("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3():
    """ModelFiles of Gemma 3 270M (Q4_K_M GGUF)."""
    from kvrun.hub import resolve

    return resolve("gemma3-270m")

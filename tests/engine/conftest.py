"""Engines over tiny models: on the reference executor in float32, and on the native one where it is built."""

from __future__ import annotations

import random

import pytest

from .tiny_model import random_model


def _devices() -> list[str]:
    try:
        import kvrun.backends.native  # noqa: F401
    except Exception:  # noqa: BLE001 - not built: the reference stands alone
        return ["reference"]
    from kvrun.backends.cuda import probe, why_not

    status = probe()
    return ["reference", "cpu", *(["cuda"] if status.devices and not why_not(status) else [])]


@pytest.fixture(params=_devices(), scope="module")
def device(request):
    """Each executor that this machine has."""
    if request.param == "reference":
        import torch

        torch.set_num_threads(1)  # tiny matrices: more threads only wait for one another
    return request.param


@pytest.fixture(scope="module")
def seed():
    """Drawn anew for each module; shown with a failure by `rng`."""
    return random.SystemRandom().randrange(1 << 32)


@pytest.fixture
def rng(seed):
    """Random inputs; pytest shows what is printed here when the test fails."""
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def model(tmp_path_factory, seed):
    """Folder of a random Llama."""
    return random_model(tmp_path_factory.mktemp("random"), seed)


@pytest.fixture(scope="module")
def sliding_model(tmp_path_factory, seed):
    """Folder of a random Mistral that sees 40 positions."""
    return random_model(tmp_path_factory.mktemp("sliding"), seed, window=40)


@pytest.fixture
def open_tiny(device):
    """open_tiny(folder, n_ctx=..., ...) -> Engine, closed after the test."""
    from kvrun.hub import resolve
    from kvrun.runtime import open_engine

    opened = []

    def open_(folder, **settings):
        engine = open_engine(resolve(str(folder)), **{"device": device, "n_ctx": 1024, "kv": "f32", "threads": 1} | settings)
        opened.append(engine)
        return engine

    yield open_
    for engine in opened:
        engine.close()

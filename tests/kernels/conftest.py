"""One kv_cpu for every instruction set that this machine grants."""

import os
import secrets

import pytest

from .plans import GRANTED, Machine, random


@pytest.fixture(scope="session", params=GRANTED)
def machine(request):
    with Machine(request.param, 2) as machine:
        yield machine


@pytest.fixture
def rng():
    return random()


def pytest_collection_modifyitems(config, items):
    """KVRUN_TEST_SHARE=n: of each test and instruction set one of n of its cases, drawn anew, where all would take too long."""
    share = int(os.environ.get("KVRUN_TEST_SHARE", 1))
    if share == 1:
        return
    draw = secrets.SystemRandom()
    cases: dict[tuple, list] = {}
    for item in items:
        isa = item.callspec.params.get("machine") if hasattr(item, "callspec") else None
        cases.setdefault((item.path, item.originalname, isa), []).append(item)
    kept = {item for group in cases.values() for item in draw.sample(group, -(-len(group) // share))}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]

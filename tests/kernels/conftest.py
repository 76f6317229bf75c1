"""One kv_cpu for every instruction set that this machine grants."""

import pytest

from .plans import GRANTED, Machine, random


@pytest.fixture(scope="session", params=GRANTED)
def machine(request):
    with Machine(request.param, 2) as machine:
        yield machine


@pytest.fixture
def rng():
    return random()

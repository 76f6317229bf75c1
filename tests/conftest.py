"""What every test shares: the two small real models, fetched into the local store on first use."""

from __future__ import annotations

import pytest


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

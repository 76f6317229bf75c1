"""A plugin for pytest with xdist: a test that leaves the GPU's context broken ends its worker. So the report names that test, and the
others have a new worker and a new context, in place of failing for an error that is not theirs."""

import os

import pytest


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """After a test, whose own report has been sent."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    import torch

    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(70)

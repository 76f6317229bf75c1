"""Tiny matrices gain nothing from several threads, and lose much to them on a busy machine."""

import pytest


@pytest.fixture
def one_thread():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

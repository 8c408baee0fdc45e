"""What every test gets: fixed seed and threads, the default ISA level afterwards, and poisoned uninitialised memory."""

from __future__ import annotations

import pytest
import torch

from mlcore import _C


def pytest_collectstart(collector):
    """Seed 0 for what a module draws when it is imported, too: a failure must come again."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_conditions():
    """Seed 0 and two threads, so that a test's numbers don't depend on the tests before it or on the machine's size."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
    _C.set_isa("")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Every torch.empty, empty_like and new_empty is full of NaN: an output or a scratch that a kernel forgets shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])

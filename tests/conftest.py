"""What every test runs under: one compute thread, libraries left in memory, and folders that tests share code from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from untrimmed import leave_libraries

leave_libraries()
sys.path.insert(0, str(Path(__file__).parent / "numerics"))


@pytest.fixture(autouse=True)
def one_torch_thread():
    """The models are tiny: a second thread only costs time, and one is the easiest order of sums to keep."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

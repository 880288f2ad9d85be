"""What every test runs under: one compute thread, libraries left in memory, and folders that tests share code from."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
from untrimmed import leave_libraries
from xdist.scheduler import LoadScopeScheduling

leave_libraries()
sys.path.insert(0, str(Path(__file__).parent / "numerics"))


class ByFile(LoadScopeScheduling):
    """Gives a worker a whole file, which may make models once for all its tests, or runs them in one process."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)


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


def pytest_runtest_setup():
    """Sets aside, once, the million objects that come with torch's compiler.

    Whoever has an optimizer has imported it. A collection would go through all of them each time, and tests that show
    that nothing is left collect often. What a test makes comes later, and is collected as ever.
    """
    if "torch._dynamo" in sys.modules and not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


def pytest_unconfigure():
    """The last collection takes all: libraries name on standard error what they find left of theirs."""
    gc.unfreeze()

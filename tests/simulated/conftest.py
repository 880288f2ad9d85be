"""The tests of each file here run in a process of their own, which has the device from its start.

A process cannot give the device back, and has it in autograd only if nothing has gone backward before. So the first
test that is run of a file starts a pytest with all of it that are selected, and each takes over its reports from there.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / each) for each in ("numerics", "zoo", "distributed")]
INSIDE = "ZEROXIDE_TESTS_SIMULATED"
HERE = Path(__file__).parent
WHOLE_FILE = 1500
"""Seconds that a file may take; within it each test has its own limit."""
reports: dict[Path, dict[str, list[Any]]] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if INSIDE not in os.environ and HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(WHOLE_FILE))


def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    # pytest asks the hooks of all folders about every test.
    if INSIDE in os.environ or HERE not in item.path.parents:
        return None
    if item.path not in reports:
        same = [each for each in item.session.items if each.path == item.path]
        reports[item.path] = dict(run_inside(item.config, same))
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports[item.path][item.nodeid]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def run_inside(config: pytest.Config, items: list[pytest.Item]) -> dict[str, list[Any]]:
    """By test, the reports of the process that has run all of them."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(each.nodeid for each in items)]
    with tempfile.NamedTemporaryFile() as file:
        env = {**os.environ, INSIDE: file.name}
        ended = subprocess.run(
            command, cwd=config.rootpath, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        those = []
        while file.peek(1):
            those.append(pickle.load(file))
    found = defaultdict(list)
    for each in those:
        found[each["nodeid"]].append(config.hook.pytest_report_from_serializable(config=config, data=each))
    for item in items:
        if not any(each.when == "teardown" for each in found[item.nodeid]):
            text = f"the process of these tests has ended with {ended.returncode}:\n{ended.stdout[-20000:]}"
            found[item.nodeid].append(
                pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call", start=0, stop=0, duration=0)
            )
    return found


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if INSIDE in os.environ and written is not None:
        data = written.hook.pytest_report_to_serializable(config=written, report=report)
        with open(os.environ[INSIDE], "ab") as file:
            # JSON would make lists of tuples, in which pytest keeps why a test was skipped.
            pickle.dump(data, file)


written: pytest.Config | None = None


def pytest_configure(config: pytest.Config) -> None:
    global written
    written = config


@pytest.fixture(autouse=True)
def sim():
    """`torch.sim` with nothing under way, nothing counted, and short delays; no test may leave threads in a copy."""
    import torch

    from simulated import device

    device.load()
    torch.sim.set_delay(0, 2000, seed=1)
    torch.sim.reset()
    torch.sim.reset_bytes()
    torch.sim.reset_peak_memory_stats()
    with torch.sim.default_stream():
        yield torch.sim
    torch.sim.reset()

"""The process that `conftest.py` runs tests in: what they came to is said outside, and other tests are run as ever."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from simulated.conftest import INSIDE

WITHIN = """
import os, pytest

@pytest.fixture(autouse=True)
def sim():
    assert {inside!r} in os.environ

def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="none")
def test_skipped(): pass
def test_left(): os._exit(3)
def test_after(): pass
"""

OUTSIDE = """
import os

def test_good(): assert {inside!r} not in os.environ
def test_bad(): assert 3 == 4
"""


def test_reports_come_from_the_process(tmp_path):
    (tmp_path / "pytest.ini").touch()
    inner, outer = tmp_path / "simulated", tmp_path / "unit"
    for folder, text in ((inner, WITHIN), (outer, OUTSIDE)):
        folder.mkdir()
        (folder / f"test_{folder.name}.py").write_text(text.format(inside=INSIDE))
    shutil.copy(Path(__file__).with_name("conftest.py"), inner)
    (inner / "__init__.py").touch()
    env = {name: value for name, value in os.environ.items() if name != INSIDE}
    command = [sys.executable, "-m", "pytest", "-rA", "--color=no", "-p", "no:cacheprovider", "simulated", "unit"]
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    outcomes = {name: outcome for outcome, name in re.findall(r"^(PASSED|FAILED) (\S+)", ended.stdout, re.MULTILINE)}
    assert outcomes == {
        "simulated/test_simulated.py::test_good": "PASSED",
        "simulated/test_simulated.py::test_bad": "FAILED",
        "simulated/test_simulated.py::test_left": "FAILED",
        "simulated/test_simulated.py::test_after": "FAILED",
        "unit/test_unit.py::test_good": "PASSED",
        "unit/test_unit.py::test_bad": "FAILED",
    }, ended.stdout
    assert "assert 1 == 2" in ended.stdout
    assert ended.stdout.count("the process of these tests has ended with 3") >= 2
    assert "4 failed, 2 passed, 1 skipped" in ended.stdout

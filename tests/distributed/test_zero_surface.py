"""ZeRO-3's user surface on two real ranks. One job runs all cases, since starting ranks takes most of the time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launching import run_ranks

SCRIPT = Path(__file__).with_name("surface_ranks.py")
CASES = re.findall(r"^def (case_\w+)\(", SCRIPT.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def job():
    return run_ranks(2, SCRIPT, CASES, timeout=240)


@pytest.mark.parametrize("case", CASES)
def test_case(job, case):
    for rank, result in enumerate(job):
        assert f"ok {case}\n" in result.out, f"rank {rank}:\n{result.out[-3000:]}\n{result.err[-2000:]}"


def test_every_rank_ended_well(job):
    assert [result.code for result in job] == [0, 0]

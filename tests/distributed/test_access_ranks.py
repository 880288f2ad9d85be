"""ZeRO-3's user surface on two real ranks. One job runs all cases, since starting ranks takes most of the time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launching import run_ranks

SCRIPT = Path(__file__).with_name("access_ranks.py")
# Resident memory is measured in ranks that have done nothing else: what others leave to the allocator comes and goes.
ALONE = "case_memory_of_construction"
CASES = [name for name in re.findall(r"^def (case_\w+)\(", SCRIPT.read_text(), re.MULTILINE) if name != ALONE]


@pytest.fixture(scope="module")
def job():
    return run_ranks(2, SCRIPT, CASES, timeout=240)


@pytest.mark.parametrize("case", CASES)
def test_case(job, case):
    for rank, result in enumerate(job):
        assert f"ok {case}\n" in result.out, f"rank {rank}:\n{result.out[-3000:]}\n{result.err[-2000:]}"


def test_memory_of_construction():
    for rank, result in enumerate(run_ranks(2, SCRIPT, [ALONE], timeout=240)):
        assert f"ok {ALONE}\n" in result.out, f"rank {rank}:\n{result.out[-3000:]}\n{result.err[-2000:]}"


def test_every_rank_ended_well(job):
    assert [result.code for result in job] == [0, 0]

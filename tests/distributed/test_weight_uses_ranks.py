"""Whoever uses a weight, it is there, also where weights move between ranks; what cannot be brought is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import run_ranks

PROGRAM = Path(__file__).with_name("weight_uses_ranks.py")
READERS = Path(__file__).with_name("stray_ranks.py")
WHOLE, TINY = 512 << 20, 8
CASES = [
    "while parts arrive",
    "after a step",
    "outside of a pass",
    "all of them outside of a pass",
    "looked at in backward",
    "under Python's lock",
    "after the end",
]


@pytest.mark.parametrize("unit_bytes", [WHOLE, TINY], ids=["blocks", "owners"])
@pytest.mark.parametrize("home", ["collective", "nvme"])
def test_unusual_use_of_weights_has_plain_torchs_gradients(home, unit_bytes):
    """Catches: views of weights that outlive their gathering; parts, and recomputed parts, that nobody announced;
    weights of more owners than have room at once; half of what arrives shown to a reader."""
    for rank, result in enumerate(run_ranks(2, PROGRAM, [home, str(unit_bytes)])):
        said = [line for line in result.out.splitlines() if line.startswith(("same", "failed"))]
        assert len(said) > 80, f"rank {rank}: {said[-3:]}\n{result.err[-2000:]}"
        assert all(line.startswith("same") for line in said), f"rank {rank}: {said[-1]}"
        assert result.code == 0


@pytest.mark.parametrize("home", ["collective", "nvme"])
@pytest.mark.parametrize("case", CASES)
def test_a_reader_that_nothing_announced_gets_weights_of_one_step_or_is_named(home, case):
    """Catches: parts of two steps in one read, zeros that are computed with, a read that waits for ever, a signal."""
    for rank, result in enumerate(run_ranks(2, READERS, [home, case])):
        assert result.code == 0, f"rank {rank}: {result.out[-1000:]}\n{result.err[-2000:]}"

"""The engine on two ranks, each with a device: the same bits as in host memory, at every stage and home."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import run_ranks

PROGRAM = Path(__file__).with_name("engine_ranks.py")
CASES = [
    ("0", "none", "none", "collective", "fp32"),
    ("1", "none", "cpu", "auto", "bf16"),
    ("2", "none", "nvme", "collective", "bf16"),
    ("2", "none", "none", "auto", "fp16"),
    ("3", "none", "none", "auto", "bf16"),
    ("3", "none", "cpu", "collective", "fp16"),
    ("3", "cpu", "cpu", "collective", "bf16"),
    ("3", "nvme", "nvme", "auto", "fp32"),
    ("3", "nvme", "nvme", "collective", "bf16"),
    ("3", "cpu", "cpu", "quantised", "bf16"),
    ("3", "cpu", "cpu", "expanded", "bf16"),
    ("3", "cpu", "nvme", "expanded", "fp16"),
    ("3", "cpu", "cpu", "viewed", "fp32"),
]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_ranks_with_devices_have_the_bits_of_the_host(case):
    """Catches: a gradient sent before it has come down, a unit sent up before its parts are there, ranks that meet at
    different points, the device of another rank, a rank that keeps views and gathers less often."""
    for rank, result in enumerate(run_ranks(2, PROGRAM, list(case))):
        assert result.code == 0, f"rank {rank}: {result.out[-1000:]}\n{result.err[-3000:]}"
        assert result.out.splitlines()[-1] == "same"


@pytest.mark.parametrize(("world", "group"), [(2, 0), (4, 2)], ids=["flat", "grouped"])
def test_weights_that_go_up_as_integers_have_the_bits_of_the_host(world, group):
    """Catches: messages taken for elements by the host, or elements for messages by the device; those of a rank's group
    in another order; messages of weights from before an edit or a step."""
    for rank, result in enumerate(run_ranks(world, Path(__file__).with_name("expanded_ranks.py"), [str(group)])):
        assert result.code == 0, f"rank {rank}: {result.out[-1000:]}\n{result.err[-3000:]}"
        assert result.out.splitlines()[-1] == "same"

"""Frozen parameters and buffers over real ranks: rank 0's bits on all of them, and in files for any world."""

from pathlib import Path

import pytest
from launching import run_ranks

PROGRAM = Path(__file__).with_name("frozen_ranks.py")


def succeed(world, *args):
    for result in run_ranks(world, PROGRAM, [str(each) for each in args]):
        assert result.code == 0, result.err[-3000:]


@pytest.mark.parametrize(
    ("stage", "offload", "transport", "precision", "other"),
    [
        (0, "none", "auto", "fp32", None),
        pytest.param(1, "nvme", "auto", "bf16", None, marks=pytest.mark.slow),
        (2, "none", "collective", "bf16", (3, 3, "nvme", "collective")),
        (3, "none", "auto", "fp32", None),
        pytest.param(3, "none", "collective", "bf16", None, marks=pytest.mark.slow),
        (3, "nvme", "collective", "fp32", (1, 0, "none", "auto")),
        pytest.param(3, "nvme", "auto", "bf16", None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_dtype_keeps_rank_0s_bits(tmp_path, stage, offload, transport, precision, other):
    succeed(2, "train", stage, offload, transport, precision, tmp_path)
    if other is not None:
        world, *mode = other
        succeed(world, "load", *mode, precision, tmp_path)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_slices_over_ranks_keep_rank_0s_bits(tmp_path, precision):
    succeed(2, "init", 3, "nvme", "auto", precision, tmp_path)

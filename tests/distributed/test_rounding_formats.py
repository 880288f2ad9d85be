"""State in formats that round, over ranks: the bits of one process, also saved by one and loaded by two."""

from pathlib import Path

import pytest
import torch
from launching import run_ranks
from rounding_program import GROUPS

PROGRAM = Path(__file__).with_name("rounding_program.py")
HALF, ALL = 3, 6


def run(world, *args):
    for result in run_ranks(world, PROGRAM, [str(each) for each in args]):
        assert result.code == 0, result.err


@pytest.mark.parametrize("stage", [1, 3])
def test_rounded_state_is_the_same_at_any_world_size(stage, tmp_path):
    found = {}
    for worlds in ((1, 1), (1, 2), (2, 1)):
        folder = tmp_path / "-".join(map(str, worlds))
        (folder / "scratch").mkdir(parents=True)
        run(worlds[0], folder, 0, HALF, stage)
        run(worlds[1], folder, HALF, ALL, stage)
        found[worlds] = torch.load(folder / "values.pt")
    alone = found.pop((1, 1))
    assert len(alone) % sum(1 + len(states) for _, _, states in GROUPS.values()) == 0
    assert all(torch.isfinite(value).all() and value.any() for value in alone.values())
    # Every rank has the same gradients, so that means of them have no rounding: one result at any world size.
    for worlds, values in found.items():
        for key, value in values.items():
            assert torch.equal(value, alone[key]), (worlds, key)

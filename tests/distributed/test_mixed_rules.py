"""Two groups with two rules in two formats, state on NVMe, saved, and resumed at another world size."""

from pathlib import Path

import pytest
import torch
from launching import run_ranks
from plain_rules import Given, gradient, lion, of_torch
from rules_program import ADAGRAD, LION, RULES

PROGRAM = Path(__file__).with_name("rules_program.py")
HALF, ALL = 3, 6


def run(world, *args):
    for result in run_ranks(world, PROGRAM, [str(each) for each in args]):
        assert result.code == 0, result.err


@pytest.mark.parametrize("stage", [1, 3])
def test_state_of_two_rules_in_two_formats_moves_between_world_sizes(stage, tmp_path):
    found = {}
    for before, after in ((1, 2), (2, 1)):
        folder = tmp_path / f"{before}-{after}"
        (folder / "scratch").mkdir(parents=True)
        run(before, folder, 0, HALF, stage)
        run(after, folder, HALF, ALL, stage)
        found[before] = torch.load(folder / "values.pt")
    start = Given(tuple(RULES), numel=5003)
    for (number, name), (weight, state) in found[1].items():
        # Every rank has the same gradients, so that means of them have no rounding: one result at any world size.
        other_weight, other_state = found[2][number, name]
        assert torch.equal(weight, other_weight)
        assert torch.equal(state, other_state)
        was = start.layers[number][name].detach()
        gradients = [gradient(number, list(RULES).index(name), at, was.numel()) for at in range(ALL)]
        if name == "first":
            expected, states, error = lion(was, gradients, **LION)
        else:
            expected, states, error = of_torch(torch.optim.Adagrad, was, gradients, **ADAGRAD)
        assert ((weight.double() - expected).abs() <= error).all(), name
        (wanted,) = states.values()
        assert ((state.double() - wanted).abs() <= 8 * ALL * 2.0**-24 * wanted.abs()).all(), name

"""What a launch costs the host, counted in calls of functions: the same on every machine, and close to the time."""

from __future__ import annotations

import sys

import pytest
import torch

from zeroxide import _core
from zeroxide.kernels.accumulate import accumulate
from zeroxide.kernels.cast import cast
from zeroxide.kernels.norm import sums_of_squares
from zeroxide.kernels.step import Step, state_tensors
from zeroxide.kernels.update import update


class Nothing:
    """A launcher that takes what it is given."""

    def launch(self, kernel, blocks, args):
        pass


def calls_of(work) -> int:
    """Functions that Python calls in `work`, of Python or of C, after a first time."""
    count = -1

    def count_calls(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    work()
    sys.setprofile(count_calls)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count - 1


TENSORS = 50


def works():
    """Launches that the engine makes, and one of many tensors: what each does, and the calls that it may take."""
    launcher = Nothing()
    home, gradient = torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16)
    many, targets = torch.zeros(TENSORS, 8), torch.zeros(TENSORS, 8, dtype=torch.bfloat16)
    step = Step("adam", _core.RULES["adam"].hyperparameters, 3)
    state = [torch.zeros(64, dtype=each.dtype) for each in state_tensors(step, "split", torch.bfloat16)]
    return {
        "accumulate": (lambda: accumulate(launcher, home, gradient, add=True), 18),
        "update": (lambda: update(launcher, step, "split", state, gradient), 30),
        "norm": (lambda: sums_of_squares(launcher, list(many)), 191),
        "cast": (lambda: cast(launcher, list(many), list(targets)), 241),
    }


@pytest.mark.parametrize("name", sorted(works()))
def test_calls_of_a_launch(name):
    """Catches: checks that are made twice, constants that are prepared for each launch, a name for each tensor."""
    work, most = works()[name]
    assert calls_of(work) <= most


def test_a_step_keeps_what_it_was_made_of():
    """Catches: constants that are of other hyperparameters than the checks, after the caller has changed his."""
    given = {**_core.RULES["sgd"].hyperparameters, "lr": 0.5}
    step = Step("sgd", given, 3)
    given["lr"] = 2.0
    assert step.hyperparameters["lr"] == 0.5
    assert step.constants == Step("sgd", {**given, "lr": 0.5}, 3).constants
    assert step.constants is step.constants

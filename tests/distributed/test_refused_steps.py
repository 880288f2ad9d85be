"""Steps over gradients that the ranks have not exchanged are refused on every rank, with the weights as they were."""

from __future__ import annotations

import pytest
from launching import run_ranks

JOB = """
import torch
from torch import nn
import zeroxide
from zeroxide.errors import RanksError

class Failing(nn.Module):
    on = False

    def forward(self, x):
        if Failing.on:
            x.register_hook(lambda grad: 1 / 0)
        return x

model = nn.Sequential(nn.Linear(8, 64), Failing(), nn.Linear(64, 64), nn.Linear(64, 1))
config = {"zero_optimization": {"stage": 3}, "zeroxide": {"transport": sys.argv[1]}, "steps_per_print": 1000}
engine, *_ = zeroxide.initialize(model=model, config=config, lr=0.1)

def loss():
    return engine(torch.ones(2, 8)).sum()

def weights():
    found = engine.module_state_dict()  # None but on rank 0
    return [value.clone() for value in (found or {}).values()]

engine.backward(loss())
engine.step()
before = weights()
with engine.no_sync():
    engine.backward(loss())
try:
    engine.step()
except RuntimeError as error:
    say("no_sync:", "have not been exchanged" in str(error))
after = weights()
say("same:", all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
# The gradients of no_sync are still there: with a backward outside they make one step.
engine.backward(loss())
engine.step()
say("applied:", engine.was_step_applied())
Failing.on = True
try:
    engine.backward(loss())
except ZeroDivisionError:
    say("failed")
Failing.on = False
engine.zero_grad()
try:
    engine.backward(loss())
    engine.step()
except RanksError as error:
    say("broken:", "go on from the last checkpoint" in str(error))
engine.watch.close()
"""


CLIPPING = """
import os
import torch
from torch import nn
import zeroxide
from zeroxide.errors import RanksError

model = nn.Linear(8, 64)
config = {"zero_optimization": {"stage": 3}, "steps_per_print": 1000}
engine, *_ = zeroxide.initialize(model=model, config=config, lr=0.1)
before = [value.clone() for value in (engine.module_state_dict() or {}).values()]
engine.set_gradient_clipping(1.0 + ranks_apart)
engine.backward(engine(torch.ones(2, 8)).sum())
try:
    engine.step()
except RanksError as error:
    say(str(error))
after = [value.clone() for value in (engine.module_state_dict() or {}).values()]
say("same:", all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
engine.set_gradient_clipping(0.5)
engine.step()
say("applied:", engine.was_step_applied())
engine.destroy()
"""


def test_ranks_that_clip_otherwise_make_no_step():
    """Catches: shards that are updated by other factors, and a model that nobody has computed."""
    for result in run_ranks(2, CLIPPING.replace("ranks_apart", "int(os.environ['RANK'])")):
        assert result.out.split("\n")[:-1] == [
            "gradient clipping is 2 on rank 1 and 1 on rank 0: call engine.set_gradient_clipping alike on every rank",
            "same: True",
            "applied: True",
        ], result.err


@pytest.mark.parametrize("transport", ["shared_memory", "collective"])
def test_gradients_that_were_not_exchanged_make_no_step(transport):
    # Catches: a step over what the step before has left in the gradients, silently, and one after half an exchange.
    results = run_ranks(2, JOB, [transport])
    for result in results:
        assert result.out.split("\n")[:-1] == [
            "no_sync: True",
            "same: True",
            "applied: True",
            "failed",
            "broken: True",
        ], result.out + result.err

"""The states that passes, uses and gradients go through, and that whatever fails leaves none of them half way."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from running import started
from torch import nn

from zeroxide.zero.current_pass import Pass
from zeroxide.zero.nested import given, handed_through, tensors_in
from zeroxide.zero.passes import GradientState, PassState, UsesState

IDLE, FORWARD, BACKWARD = PassState.IDLE, PassState.FORWARD, PassState.BACKWARD


class Stop(Exception):
    """Raised where the test wants it."""


class Chain(nn.Module):
    """Two blocks, which tell what passes are when they run."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.look = lambda where: None

    def forward(self, x, twice=False):
        self.look("forward")
        for block in self.blocks:
            x = block(x)
        if twice:
            x = self.blocks[1](x)
        if x.requires_grad:
            x.register_hook(lambda grad: self.look("backward"))
        return x.sum()


@pytest.fixture(params=[2, 3])
def chain(request):
    model = Chain()
    config = {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": request.param}}
    with started(model, config=config) as engine:
        yield model, engine, engine.parts.hooks


def step(call, backward):
    backward(call(torch.ones(1, 4)))


def gradients(engine):
    return {unit.gradients for unit in engine.parts.units}


@pytest.mark.parametrize("way", [(FORWARD,), (BACKWARD,), (FORWARD, BACKWARD)])
def test_a_pass_begins_from_what_may_come_before_it(way):
    current = Pass()
    for state in way:
        current.become(state)
    assert current.state is way[-1]
    for wrong in (IDLE, FORWARD, way[-1]):
        with pytest.raises(AssertionError, match="does not follow"):
            current.become(wrong)


def test_a_step_goes_through_the_states_in_order(chain):
    model, engine, hooks = chain
    seen = []
    model.look = lambda where: seen.append((where, hooks.current.state, hooks.uses.state, gradients(engine)))
    first = hooks.uses
    assert (hooks.current.state, first.state) == (IDLE, UsesState.NONE)
    with torch.no_grad():
        engine(torch.ones(1, 4))
    assert (hooks.current.state, hooks.uses.state) == (IDLE, UsesState.NONE)
    loss = engine(torch.ones(1, 4))
    assert (hooks.current.state, hooks.uses.state) == (IDLE, UsesState.PENDING)
    between = hooks.current
    engine.backward(loss)
    assert hooks.current is not between
    assert (hooks.current.state, hooks.uses.state) == (IDLE, UsesState.ENDED)
    assert gradients(engine) == {GradientState.IDLE}
    idle = {GradientState.IDLE}
    assert seen == [
        ("forward", FORWARD, UsesState.NONE, idle),
        ("forward", FORWARD, UsesState.PENDING, idle),
        ("backward", BACKWARD, UsesState.PENDING, {GradientState.OPEN}),
    ]
    assert hooks.uses is first
    engine(torch.ones(1, 4))
    assert hooks.uses is not first
    assert hooks.uses.state is UsesState.PENDING


def test_forwards_before_one_backward_count_together(chain):
    _, engine, hooks = chain
    once = engine(torch.ones(1, 4))
    assert hooks.uses.repeated == set()
    loss = once + engine(torch.full((1, 4), 2.0))
    assert len(hooks.uses.repeated) == 2
    engine.backward(loss)
    engine.step()
    engine.backward(engine(torch.ones(1, 4)))
    assert hooks.uses.repeated == set(), "the next forward began anew"
    engine(torch.ones(1, 4), twice=True)
    assert len(hooks.uses.repeated) == 1


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_pass_that_fails_is_over(chain, where):
    model, engine, hooks = chain

    def stop(at):
        if at == where:
            raise Stop

    model.look = stop
    for direct in (False, True):
        with pytest.raises(Stop):
            step(model if direct else engine, torch.Tensor.backward if direct else engine.backward)
        if not (direct and where == "backward"):
            # Of a backward that the engine did not start it hears when the next pass begins.
            assert hooks.current.state is IDLE
            assert not hooks.current.under_way
            assert gradients(engine) == {GradientState.IDLE}
    model.look = lambda at: None
    engine.zero_grad()
    engine.backward(engine(torch.ones(1, 4)))
    assert (hooks.current.state, hooks.current.depth, hooks.current.inputs) == (IDLE, 0, [])
    engine.step()
    assert engine.was_step_applied()


def test_a_forward_that_follows_a_failed_backward_is_a_pass(chain):
    """Catches: a depth of 0 inside of it, after which uses of weights would be taken for uses outside of passes."""
    model, _, hooks = chain
    seen = []

    def look(at):
        seen.append((at, hooks.current.state, hooks.current.depth))
        if len(seen) == 2:
            raise Stop

    model.look = look
    with pytest.raises(Stop):
        model(torch.ones(1, 4)).backward()
    model(torch.ones(1, 4))
    assert seen == [("forward", FORWARD, 1), ("backward", BACKWARD, 0), ("forward", FORWARD, 1)]


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    rest: object = None


Pair = collections.namedtuple("Pair", "left right")


def test_tensors_are_found_in_whatever_modules_take_and_give():
    tensors = [torch.tensor(float(number)) for number in range(8)]
    a, b, c, d, e, f, g, h = tensors
    tree = (a, None, True, [b, {"c": c, "none": None}], Pair(d, (e,)), Output(f, rest=[g, 3, "x"]))
    found = tensors_in(*tree, {"h": h})
    assert sorted(map(float, found)) == [float(number) for number in range(8)]
    assert all(any(each is tensor for tensor in tensors) for each in found)
    assert tensors_in() == tensors_in(None, (), {}, "text", Output) == []


def test_what_an_operation_in_place_makes_is_new():
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    before = given([x, y])
    assert handed_through(x, before)
    assert handed_through(y, before)
    y.add_(1)
    assert handed_through(x, before)
    assert not handed_through(y, before)
    assert handed_through(y, given([y]))
    left, right = (x * 3).split(1)
    assert not any(handed_through(part, given([left])) for part in (right, x))
    view, base = y[:1], given([y])
    view.mul_(2)
    assert not handed_through(y, base)


def test_an_inference_tensor_has_no_version_and_is_handed_through():
    with torch.inference_mode():
        x = torch.ones(2)
    assert handed_through(x, given([x]))

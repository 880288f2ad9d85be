"""Training with weights in host memory, as an engine does it, on three streams: each wait of it is missed.

A unit's weights come up ahead of use into storage that goes and comes back under its parameters; its gradients go down
as its backward ends; the host updates its own copy of the weights, which come up again for the next step.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

UNITS, WIDTH, STEPS, RATE = 3, 16, 2, 0.1


class Unit:
    def __init__(self, layer, up, down, used):
        self.parameters = list(layer.parameters())
        self.up, self.down, self.compute = up, down, torch.accelerator.current_stream()
        self.host = torch.cat([each.detach().flatten() for each in self.parameters]).pin_memory()
        self.gradient = torch.zeros_like(self.host, pin_memory=True)
        self.used = used
        self.came, self.computed, self.went = (torch.Event("sim") for _ in range(3))
        with up:
            self.flat = torch.empty(self.host.shape, device="sim")
        self.missing = 0
        self.before: Unit | None = None
        self.after: Unit | None = None
        parts = self.flat.split([each.numel() for each in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.data = part.view(parameter.shape)
            parameter.register_post_accumulate_grad_hook(self.accumulated)
        self.flat.untyped_storage().resize_(0)

    def fetch(self):
        """Memory that a unit has left may be taken for it, so that this waits for the last use of any."""
        if self.flat.untyped_storage().nbytes() == 0:
            self.up.wait_event(self.used)
            with self.up:
                self.flat.untyped_storage().resize_(self.host.nbytes)
                self.flat.copy_(self.host, non_blocking=True)
                self.came.record()

    def gather(self, ahead):
        """For use now; and the one that comes next, as well as memory allows, behind it."""
        self.fetch()
        self.compute.wait_event(self.came)
        if ahead is not None:
            ahead.fetch()

    def before_forward(self, *_):
        self.gather(self.after)

    def before_backward(self, *_):
        self.gather(self.before)

    def release(self, *_):
        self.used.record(self.compute)
        self.flat.untyped_storage().resize_(0)

    def accumulated(self, _):
        """The last gradient takes all of them down."""
        self.missing = (self.missing or len(self.parameters)) - 1
        if self.missing:
            return
        self.computed.record(self.compute)
        self.down.wait_event(self.computed)
        parts = self.gradient.split([each.numel() for each in self.parameters])
        with self.down:
            for parameter, part in zip(self.parameters, parts, strict=True):
                part.copy_(parameter.grad.flatten(), non_blocking=True)
                parameter.grad.record_stream(self.down)
                parameter.grad = None
            self.went.record()
        self.release()

    def update(self):
        self.went.synchronize()
        self.host.sub_(self.gradient, alpha=RATE)


def build():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(UNITS)))
    return model, torch.randn(5, WIDTH)


def run(sim, forgotten=()):
    """The weights on the host after some steps, without the waits of those numbers."""
    model, x = build()
    x = x.to("sim").requires_grad_()
    up, down, used = torch.Stream("sim"), torch.Stream("sim"), torch.Event("sim")
    units = [Unit(layer, up, down, used) for layer in model]
    for layer, unit in zip(model, units, strict=True):
        layer.register_forward_pre_hook(unit.before_forward)
        layer.register_forward_hook(unit.release)
        layer.register_full_backward_pre_hook(unit.before_backward)
    for first, second in pairwise(units):
        first.after, second.before = second, first
    torch.accelerator.synchronize()
    sim.reset()
    sim.reset_bytes()
    for each in forgotten:
        sim.forget_wait(each)
    with sim.watch_host():
        for _ in range(STEPS):
            model(x).square().sum().backward()
            for unit in units:
                unit.update()
    return [unit.host.clone() for unit in units]


def plain():
    model, x = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [torch.cat([each.detach().flatten() for each in layer.parameters()]) for layer in model]


def test_it_trains_to_the_bits_of_the_host(sim):
    weights = run(sim)
    assert all(ours.equal(theirs) for ours, theirs in zip(weights, plain(), strict=True))
    assert [str(each) for each in sim.races()] == []
    size = sum(each.nbytes for each in weights)
    assert (sim.usage().up, sim.usage().down) == (2 * STEPS * size, STEPS * size)


def test_each_wait_that_is_needed_is_missed(sim):
    """A wait that orders nothing new, such as one for a copy before the last of its stream, is not needed."""
    run(sim)
    waits = sim.wait_list()
    needed = [number for number, each in enumerate(waits) if each.needed]
    found = []
    for number in needed:
        run(sim, [number])
        assert sim.waits() == len(waits)
        found.append(bool(sim.races()))
    assert found == [True] * len(needed)
    # Per step: each unit comes twice and goes once, memory is left and taken, and the host waits.
    assert len(needed) >= STEPS * (3 * UNITS + 2 + 1)
    run(sim, {*range(len(waits))} - {*needed})
    assert sim.races() == []

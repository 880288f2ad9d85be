"""Weights and gradients travel while modules compute, and the bits are those of waiting for each of them.

Blocks run in an order that the test chooses, the same on all ranks. Two of them are eight times the size of the others,
so that what is held ahead does not always leave room for what comes instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import run_ranks

MODEL = """
import json
import torch
from torch import nn
import zeroxide
from zeroxide.engine import build as build_module
from zeroxide.zero import messages

WIDTH = 512
events = []

class Block(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number = number
        inner = 256 if number % 2 else 2048
        self.a, self.b = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)

    def forward(self, x):
        events.append(["forward", self.number])
        inside = torch.relu(self.a(x))
        if inside.requires_grad:
            inside.register_hook(lambda grad: events.append(["backward", self.number]))
        return x + self.b(inside)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(number) for number in range(4))
        self.scale = nn.Parameter(torch.ones(WIDTH))  # of a unit that is held from the first use to the last
        self.order = [0, 1, 2, 3]

    def forward(self, x):
        x = x * self.scale
        for number in self.order:
            x = self.blocks[number](x)
        return (x * self.scale).square().mean()

def make(transport, prefetch, disk=None):
    torch.manual_seed(0)
    zero = {"stage": 3}
    if disk is not None:
        for which in ("offload_param", "offload_optimizer"):
            zero[which] = {"device": "nvme", "nvme_path": disk}
    own = {"transport": transport, "prefetch": prefetch, "threads": 1, "tile_bytes": 1 << 16, "staging_bytes": 1 << 21}
    config = {"zero_optimization": zero, "zeroxide": own, "steps_per_print": 1000}
    engine, *_ = zeroxide.initialize(model=Model(), config=config, lr=1e-2)
    return engine

def rows(step):
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * step + ranks.rank))
"""


def found(world: int, source: str, args: list[str] | None = None) -> list[Any]:
    """What each rank says in its line "FOUND {...}"."""
    results = run_ranks(world, MODEL + source, args or [])
    for rank, result in enumerate(results):
        assert result.code == 0, f"rank {rank}: {result.out}\n{result.err}"
    lines = [next(line for line in result.out.splitlines() if line.startswith("FOUND ")) for result in results]
    return [json.loads(line.removeprefix("FOUND ")) for line in lines]


def when(events: list[list[Any]]) -> dict[tuple[Any, ...], int]:
    """Where each event is; each happens once."""
    at = {tuple(event): index for index, event in enumerate(events)}
    assert len(at) == len(events), events
    return at


EVENTS = """
class Work(messages.Work):
    def received(self):
        if self.arriving:
            events.append([self.kind + " waited for", self.name])
        super().received()

class Spied(messages.Messages):
    def start(self, work, incoming, outgoing):
        events.append([work.kind + " begun", work.name])
        return super().start(work, incoming, outgoing)

messages.Work = Work
build_module.Messages = Spied
engine = make("collective", 1)
for step in range(3):
    events.clear()
    engine.backward(engine(rows(step)))
    engine.step()
usual = list(events)
engine.module.order = [0, 2, 3]
events.clear()
engine.backward(engine(rows(3)))
engine.destroy()
say("FOUND " + json.dumps([usual, events]))
"""


def test_what_comes_next_travels_while_a_module_computes():
    # Catches: a gather that is waited for where it begins, or begun where it is used; a reduction likewise.
    for events, _ in found(2, EVENTS):
        turn = events.index(["forward", 3])
        at = when(events[:turn])
        for number in range(3):
            name = f"blocks.{number + 1}"
            assert at["all-gather begun", name] < at["forward", number] < at["all-gather waited for", name]
        at = when(events[turn:])
        # Two of the four have room: those used last are still there.
        assert [name for what, name in at if what == "all-gather begun"] == ["blocks.1", "blocks.0"]
        for number in range(2):
            name = f"blocks.{number}"
            assert at["all-gather begun", name] < at["backward", number + 1] < at["all-gather waited for", name]
        for number in range(1, 4):
            name = f"blocks.{number}"
            assert at["all-to-all begun", name] < at["backward", number - 1] < at["all-to-all waited for", name]
        assert ("all-to-all waited for", "blocks.0") in at


def test_a_block_left_out_does_not_end_gathering_ahead():
    # Catches: a position that stays where the orders parted; room that is kept for what does not come.
    for _, events in found(2, EVENTS):
        at = when(events[: events.index(["backward", 3])])
        # Sent for before block 0 ran, as the step before had it next.
        assert at["all-gather begun", "blocks.1"] < at["forward", 0]
        assert at["all-gather begun", "blocks.3"] < at["forward", 2] < at["all-gather waited for", "blocks.3"]


ORDERS = """
steps = [[0, 1, 2, 3], [0, 1, 2, 3], [1, 0], [1, 0, 1, 2, 0, 2], [1, 0], [1, 2], [3, 2, 1, 0]]
steps += [[0, 2], [1, 1, 3], [2, 0, 2], [0, 1, 2, 3], [3]]
disk = sys.argv[1] if len(sys.argv) > 1 else None
made = {}
for transport, prefetch in (("shared_memory", 1), ("collective", 0), ("collective", 1), ("collective", 3)):
    if disk is not None and transport == "shared_memory":
        continue  # moves weights as the others do
    engine = make(transport, prefetch, disk)
    seen = []
    for step, order in enumerate(steps):
        engine.module.order = order
        loss = engine(rows(step))
        engine.backward(loss)
        engine.step()
        seen.append(loss.item())
        if step == 1 and transport == "collective":
            # Later, units wait for their turn to be reduced, in memory beyond the plan.
            used, planned = engine.memory(), engine.plan().buckets
            assert all(used[name]["peak"] <= planned[name] for name in planned), (used, planned)
        engine.module.order = order[::-1]
        with torch.no_grad():
            seen.append(engine(rows(100 + step)).item())
    for block in engine.module.blocks:
        with zeroxide.zero.GatheredParameters(block.parameters()):
            seen += [param.double().sum().item() for param in block.parameters()]
    made[f"{transport} {prefetch}"] = seen
    engine.destroy()
say("FOUND " + json.dumps(made))
"""


@pytest.mark.parametrize("home", ["memory", "disk"])
def test_an_order_that_changes_costs_no_bit(home: str, tmp_path: Path):
    """Orders that were not seen before, blocks left out, used twice or in reverse; the same on all ranks."""
    # Catches: a unit that is held ahead and never let go, so that another has no room; one whose parts had not arrived.
    for made in found(2, ORDERS, [str(tmp_path)] if home == "disk" else []):
        first, *others = made.values()
        assert len(others) == (3 if home == "memory" else 2)
        for other in others:
            assert other == first


CHANGES = """
disk = sys.argv[1] or None
made = []
for transport in ("shared_memory", "collective"):
    seen = []
    engine = make(transport, 1, disk)
    def forward(order, step):
        engine.module.order = order
        return engine(rows(step))
    def look():
        # Of all ranks' shards: each sees the same.
        with torch.no_grad():
            seen.append(forward([2], 50).item())
    for step in range(2):
        engine.backward(forward([0, 1, 2, 3], step))
        engine.step()
    look()
    # With gradients, but never followed by a backward: block 2 is on its way when it ends.
    def leave_under_way():
        engine.backward(forward([0, 1, 2, 3], 7))
        forward([0, 1], 8)
        if transport == "collective":
            assert engine.parts.weights._flights, "nothing is on its way: the test shows nothing"
    leave_under_way()
    engine.step()
    look()
    leave_under_way()
    with zeroxide.zero.GatheredParameters(engine.module.blocks[2].parameters(), modifier_rank=1):
        for param in engine.module.blocks[2].parameters():
            param.data.mul_(1.5)
    look()
    engine.zero_grad()
    engine.save_checkpoint(sys.argv[2], tag=transport)
    engine.backward(forward([0, 1, 2, 3], 9))
    engine.step()
    look()
    leave_under_way()
    engine.load_checkpoint(sys.argv[2], tag=transport)
    look()
    assert seen[-1] == seen[-3] != seen[-2]
    leave_under_way()
    engine.destroy()
    made.append(seen)
say("FOUND " + json.dumps(made))
"""


@pytest.mark.parametrize("home", ["memory", "disk"])
def test_weights_that_change_while_they_travel_are_gathered_again(home: str, tmp_path: Path):
    """A step, an edit and a load after a forward whose backward never came; then destroy in the same state."""
    # Catches: parts that were sent for before a change and taken for the changed ones.
    for first, second in found(2, CHANGES, [str(tmp_path) if home == "disk" else "", str(tmp_path / "saved")]):
        assert len(first) == 5
        assert first == second


LEFT = """
engine = make("collective", 1)
for step in range(2):
    engine.backward(engine(rows(step)))
    engine.step()
engine.module.order = [0, 1]
if ranks.rank == 1:
    # Rank 0 is at the end of its forward, and waits for nothing, when rank 1 has yet to send for block 2.
    engine.module.blocks[0].register_forward_hook(lambda *_: time.sleep(2.0))
engine(rows(3))
assert engine.parts.weights._flights
if sys.argv[1] == "destroy":
    engine.destroy()
say("FOUND 1")
"""


@pytest.mark.parametrize("how", ["destroy", "end of the program"])
def test_a_rank_that_ends_with_weights_on_their_way_ends_well(how: str):
    # Catches: memory that goes before messages that read and write it.
    assert found(2, LEFT, [how]) == [1, 1]


LEAVES = """
class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    def forward(self, x, both):
        made = self.experts[0](x)
        return made + self.experts[1](x) if both else made

class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Experts() for _ in range(5))

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            x = x + torch.tanh(block(x, ranks.rank == 0 or number != 4))
        return x.square().mean()

made = []
for transport in ("shared_memory", "collective"):
    torch.manual_seed(0)
    model = Routed()
    zeroxide.zero.set_z3_leaf_modules(model, [Experts])
    own = {"transport": transport, "threads": 1, "rank_timeout": 3}
    config = {"zero_optimization": {"stage": 3}, "zeroxide": own, "steps_per_print": 1000}
    engine, *_ = zeroxide.initialize(model=model, config=config, lr=1e-2)
    seen = []
    for step in range(3):
        loss = engine(torch.randn(4, 64, generator=torch.Generator().manual_seed(10 * step + ranks.rank)))
        engine.backward(loss)
        engine.step()
        seen.append([loss.item(), float(engine.get_global_grad_norm())])
    made.append(seen)
    engine.destroy()
say("FOUND " + json.dumps(made))
"""


def test_ranks_that_use_other_experts_do_not_wait_for_one_another():
    # Catches: a leaf module that is sent when its gradients are complete, which on one rank is only when backward ends.
    for first, second in found(2, LEAVES):
        assert first == second
        assert len(first) == 3


FAILED_WAIT = """
engine = make("collective", 1)
for step in range(2):
    engine.backward(engine(rows(step)))
    engine.step()
real = messages.Work.sent
def interrupted(self):
    # As a signal does: the wait is over, and what comes after it is not reached.
    for work in self.leaving + self.arriving:
        work.wait()
    messages.Work.sent = real
    raise KeyboardInterrupt
messages.Work.sent = interrupted
try:
    engine(rows(2))
    raise AssertionError("nothing was waited for")
except KeyboardInterrupt:
    pass
for step in range(3, 5):
    engine.backward(engine(rows(step)))
    engine.step()
engine.destroy()
say("FOUND 1")
"""


def test_a_wait_that_is_interrupted_is_not_repeated_and_forgets_nothing():
    # Catches: a unit let go though its messages were not waited for; a second wait for what gloo tells only once.
    assert found(2, FAILED_WAIT) == [1, 1]


FAILED_START = """
import torch.distributed as dist
engine = make("collective", 1)
for step in range(2):
    engine.backward(engine(rows(step)))
    engine.step()
real = dist.isend
def interrupted(*given, **more):
    dist.isend = real
    raise KeyboardInterrupt
dist.isend = interrupted
said = []
for _ in range(2):
    try:
        engine(rows(2))
    except KeyboardInterrupt:
        said.append("interrupted")
    except zeroxide.errors.RanksError as error:
        said.append(str(error))
engine.destroy()
say("FOUND " + json.dumps(said))
"""


def test_a_start_that_is_interrupted_is_never_taken_for_a_gather():
    # Catches: parts taken for whole that nobody was asked for.
    for said in found(2, FAILED_START):
        assert len(said) == 2, "the second forward must not run on weights that are not there"
        assert any("was interrupted when it began" in each for each in said), said

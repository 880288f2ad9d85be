"""What the plan says that a step exchanges is what it does exchange, collective by collective."""

from __future__ import annotations

import json

import pytest
from launching import run_ranks

# Counts the collectives of the third step: by then the order of gathering is known and the state is steady.
JOB = """
import json
import torch
from torch import nn
import zeroxide
from zeroxide.engine import build as build_module
from zeroxide.zero import messages
from zeroxide.plan.schedule import collectives, sent_bytes

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.a.bias.requires_grad_(False)

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 64)
        self.blocks = nn.ModuleList(Block(64) for _ in range(4))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x.square().mean()

calls = []

class Spied(messages.Messages):
    def work(self, kind, unit):
        calls.append([kind, unit.name])
        return super().work(kind, unit)

    def start(self, work, incoming, outgoing):
        calls[-1].append(sum(tensor.nbytes for _, tensor in outgoing))
        assert calls[-1][2] == sum(tensor.nbytes for _, tensor in incoming)
        return super().start(work, incoming, outgoing)

build_module.Messages = Spied
found = []
for stage in (0, 1, 2, 3):
    for transport in ("collective", "shared_memory"):
        torch.manual_seed(0)
        config = {"zero_optimization": {"stage": stage}, "zeroxide": {"transport": transport}, "steps_per_print": 1000}
        engine, *_ = zeroxide.initialize(model=Model(), config=config, lr=1e-3)
        for _ in range(3):
            calls.clear()
            before = engine.exchanged_bytes()
            engine.backward(engine(torch.ones(2, 8)))
            engine.step()
        steps = collectives(engine.plan())
        planned = [[each.kind, each.unit, each.sent] for each in steps]
        moved = engine.exchanged_bytes() - before
        found.append([stage, transport, planned, list(calls), sent_bytes(engine.plan()), moved])
        engine.destroy()
if ranks.rank == 0:
    say("FOUND " + json.dumps(found))
"""


@pytest.mark.parametrize("world", [2, 3])
def test_the_schedule_is_what_happens(world):
    # Catches: a unit gathered twice or never in the schedule, units kept that were evicted, shards of another size.
    results = run_ranks(world, JOB)
    assert [result.code for result in results] == [0] * world, results[0].err
    line = next(line for line in results[0].out.splitlines() if line.startswith("FOUND "))
    rows = json.loads(line.removeprefix("FOUND "))
    assert len(rows) == 8
    for stage, transport, planned, happened, expected_bytes, moved in rows:
        assert happened == planned, (stage, transport)
        assert moved == expected_bytes, (stage, transport)
    # Stage 3 over collectives has both kinds, so the comparison was not one of empty lists.
    kinds = {kind for stage, transport, _, happened, *_ in rows if stage == 3 for kind, *_ in happened}
    assert kinds == {"all-gather", "all-to-all"}

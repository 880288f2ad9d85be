"""State dicts at stage 3 are asked for by all ranks; one that asks alone is told who did not."""

from __future__ import annotations

import re

import pytest
from launching import run_ranks

SOURCE = """
import sys, time
import torch
from models import build
import zeroxide

torch.set_num_threads(1)
transport, other = sys.argv[1:]
model = build("gpt")
config = {
    "optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3}, "steps_per_print": None,
    "zeroxide": {"transport": transport, "threads": 1, "rank_timeout": 2},
}
engine, *_ = zeroxide.initialize(model=model, config=config)
ids = torch.randint(0, 61, (2, 12))

def train():
    engine.backward(engine(ids))
    engine.step()

train()
if engine.global_rank == 0:
    model.state_dict()
elif other == "trains":
    train()
elif other == "sleeps":
    while "has waited 2 s" not in open(__file__.replace("rank.py", "0.err")).read():
        time.sleep(0.1)
    model.state_dict()
if other != "leaves" or engine.global_rank == 0:
    engine.ranks.barrier()
engine.destroy()
print("done", flush=True)
"""
LINES = {
    "trains": r"zeroxide: error: ranks have waited for different things .* rank 0 waiting for a broadcast.*wte\.weight",
    "leaves": r"zeroxide: error: rank 1 finished, and the others have waited .* rank 0 waiting for a broadcast",
}


@pytest.mark.parametrize("transport", ["shared_memory", "collective"])
@pytest.mark.parametrize("other", list(LINES))
def test_a_rank_that_asks_alone_is_told(transport, other):
    first, second = run_ranks(2, SOURCE, [transport, other], timeout=100)
    assert re.search(LINES[other], first.err), first.err
    assert first.code not in (0, None)
    assert (second.code == 0) is (other == "leaves")


@pytest.mark.parametrize("transport", ["shared_memory", "collective"])
def test_a_rank_that_waits_says_so_and_gets_its_answer(transport):
    """The other one comes when it has read what the first one says in the log."""
    first, second = run_ranks(2, SOURCE, [transport, "sleeps"], timeout=100)
    assert "rank 0 has waited 2 s for the other ranks to ask for the state of wte.weight: at stage 3 every" in first.err
    assert (first.code, second.code) == (0, 0), (first, second)
    assert first.out.endswith("done\n")

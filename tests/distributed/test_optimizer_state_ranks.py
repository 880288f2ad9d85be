"""The optimizer state of several ranks, saved by all of them and loaded at another number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import run_ranks

TESTS = Path(__file__).parents[1]

PART = """
import os, sys
sys.path[:0] = [{tests!r}, {tests!r} + "/numerics"]
import torch
torch.set_num_threads(1)
from models import build
import zeroxide

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
def ids(seed):
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(seed))

def engine_of(model):
    return zeroxide.initialize(model=model, config={{
        "bf16": {{"enabled": True}}, "zero_optimization": {{"stage": {stage}}},
        "zeroxide": {{"threads": 1, "transport": {transport!r}}},
        "optimizer": {{"type": "AdamW", "params": {{"lr": 1e-2}}}}, "steps_per_print": None,
    }})[0]

def train(engine, seeds):
    # Every rank has the same batch, so that one rank alone would train alike but for the order of sums.
    for seed in seeds:
        engine.backward(engine(ids(seed)))
        engine.step()
"""

SAVE = (
    PART
    + """
torch.manual_seed(0)
engine = engine_of(build("gpt"))
train(engine, range(3))
state = {{"model": engine.module_state_dict(), "optimizer": engine.optimizer.state_dict()}}
torch.save(state, {path!r} + str(RANK))
alone = engine.optimizer.state_dict()["state"][0]["exp_avg"]
assert torch.equal(alone, zeroxide.safe_get_full_optimizer_state(next(engine.module.parameters()), "exp_avg"))
print("saved", flush=True)
"""
)

LOAD = (
    PART
    + """
saved = torch.load({path!r} + "0", weights_only=True)
model = build("gpt")
model.load_state_dict(saved["model"])
engine = engine_of(model)
engine.optimizer.load_state_dict(saved["optimizer"])
names = [name for name, _ in engine.module.named_parameters()]
for number, param in enumerate(engine.module.parameters()):
    entry = saved["optimizer"]["state"][number]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(zeroxide.safe_get_full_optimizer_state(param, key), entry[key]), names[number]
    assert torch.equal(zeroxide.safe_get_full_fp32_param(param), entry["master"]), names[number]
assert engine.optimizer.state[next(engine.module.parameters())]["step"] == 3
train(engine, range(3, 4))
assert engine.was_step_applied()
print("loaded", flush=True)
"""
)

ALONE = (
    PART
    + """
engine = engine_of(build("gpt"))
train(engine, range(1))
if RANK == 0:
    torch.save(engine.optimizer.state_dict(), {path!r} + "alone")
train(engine, range(1, 2))
print("went on", flush=True)
"""
)


@pytest.mark.parametrize(
    ("stage", "transport", "world", "other"),
    [(0, "auto", 1, 0), (1, "collective", 3, 3), (2, "auto", 1, 0), (3, "collective", 3, 2)],
)
def test_state_moves_between_numbers_of_ranks(stage, transport, world, other, tmp_path):
    """Catches: a rank that writes another's part, and values that are not brought together."""
    with_path = {"tests": str(TESTS), "path": str(tmp_path / "plain.pt"), "transport": transport}
    for result in run_ranks(2, SAVE.format(stage=stage, **with_path), timeout=120):
        assert result.out == "saved\n", result.err[-3000:]
    states = [torch.load(tmp_path / f"plain.pt{rank}", weights_only=True)["optimizer"] for rank in range(2)]
    for number, entry in states[0]["state"].items():
        assert all(torch.equal(value, states[1]["state"][number][key]) for key, value in entry.items())
    for result in run_ranks(world, LOAD.format(stage=other, **with_path), timeout=120):
        assert result.out == "loaded\n", result.err[-3000:]


def test_a_rank_that_saves_alone_is_named(tmp_path):
    """Not a silent hang: the other rank waits for something else, and both end with one line."""
    job = run_ranks(2, ALONE.format(stage=2, transport="auto", tests=str(TESTS), path=str(tmp_path / "x")), timeout=120)
    for result in job:
        assert result.code != 0
        assert "went on" not in result.out
    assert any("rank 0" in result.err and "broadcast" in result.err for result in job), [r.err[-1500:] for r in job]

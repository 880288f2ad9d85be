"""fp16 on two ranks: an overflow on one of them is one on both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import run_ranks

TESTS = Path(__file__).parents[1]

TRAIN = """
import hashlib, json, math
sys.path[:0] = [{tests!r}, {tests!r} + "/numerics"]
from models import batches, build
from running import state_of
import zeroxide

config = {{
    "fp16": {{"enabled": True, "initial_scale_power": 6, "hysteresis": 2}},
    "optimizer": {{"type": "AdamW", "params": {{"lr": 1e-3}}}},
    "gradient_clipping": 0.5,
    "zero_optimization": {{"stage": {stage}}},
    "zeroxide": {{"threads": 1, "transport": {transport!r}}},
    "scheduler": {{"type": "WarmupLR", "params": {{"warmup_max_lr": 1e-3, "warmup_num_steps": 10}}}},
}}
engine, *_ = zeroxide.initialize(model=build("gpt"), config=config)
feed = batches("gpt", 2 * 6, seed=3)
steps = []
for step in range(6):
    if step in {left_out}:
        continue
    loss = engine(**feed[2 * step + ranks.rank])
    # Infinity on one rank only.
    engine.backward(loss * math.inf if step in {spoiled} and ranks.rank == 1 else loss)
    engine.step()
    norm = float(engine.get_global_grad_norm())
    steps.append([engine.optimizer.overflow, engine.skipped_steps, engine.loss_scale(), engine.get_lr(), repr(norm)])
core, digest = engine.parts.core(), hashlib.sha256()
for unit in engine.parts.units:
    engine.parts.gatherer.gather(unit)
    for param in unit.params:
        digest.update(param.detach().numpy().tobytes())
    engine.parts.gatherer.release(unit)
say(json.dumps({{"steps": steps, "weights": digest.hexdigest()}}))
engine.destroy()
"""


def train(stage, transport, *, spoiled=(), left_out=()):
    """What both ranks say, which must be the same."""
    source = TRAIN.format(tests=str(TESTS), stage=stage, transport=transport, spoiled=spoiled, left_out=left_out)
    results = run_ranks(2, source)
    for result in results:
        assert result.code == 0, result.err
    first, second = (json.loads(result.out.splitlines()[-1]) for result in results)
    assert first == second
    return first


@pytest.mark.parametrize(("stage", "transport"), [(0, "collective"), (2, "shared_memory"), (3, "shared_memory")])
def test_an_overflow_on_one_rank_skips_the_step_on_all(stage, transport):
    """Steps that overflow are left out as if they had not been, until one of them halves the scale."""
    got = train(stage, transport, spoiled=(2,))
    assert [step[:3] for step in got["steps"]] == [
        [False, 0, 64.0], [False, 0, 64.0], [True, 1, 64.0], [False, 1, 64.0], [False, 1, 64.0], [False, 1, 64.0],
    ]  # fmt: skip
    assert got["weights"] == train(stage, transport, left_out=(2,))["weights"]
    both = train(stage, transport, spoiled=(2, 3))
    assert [step[2] for step in both["steps"]] == [64.0, 64.0, 64.0, 32.0, 32.0, 32.0]
    rates = [step[3] for step in both["steps"]]
    assert rates[1] == rates[2] == rates[3] != rates[4]

"""Monitors, times and the FLOPs profiler on a device: the same bits as without them, and no unordered access."""

from __future__ import annotations

import json

import pytest
from models import batches, build, loss_of
from running import Mode, config_of, started, weights_of

from simulated import engines
from zeroxide.profiling import get_model_profile

MODES = {"resident": Mode("none", "none", "split"), "transient": Mode("cpu", "cpu", "split")}
STEPS = 3


def run(mode, folder, **more):
    """Losses, and weights at the end."""
    model, losses = build("gpt"), []
    model.train()
    config = config_of(MODES[mode], folder, "bf16")
    config["zeroxide"] |= {"device": "sim", "log": str(folder / "steps.jsonl")} if more else {"device": "sim"}
    with engines.followed(), started(model, config=config | more) as engine:
        for batch in batches("gpt", STEPS):
            loss = loss_of(engine(**{name: value.to("sim") for name, value in batch.items()}))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses, weights_of(engine), engine.get_wall_clock_timers()


@pytest.mark.parametrize("mode", MODES)
def test_what_watches_changes_no_bit(mode, tmp_path, sim):
    """Catches: a loss that is not the step's own, parameters counted as they are when they are not there."""
    sim.set_delay(0, 200, seed=2)
    profile = tmp_path / "profile.txt"
    watched = {
        "wall_clock_breakdown": True,
        "flops_profiler": {"enabled": True, "profile_step": 1, "output_file": str(profile)},
    }
    losses, weights, times = run(mode, tmp_path, **watched)
    expected_losses, expected, none = run(mode, tmp_path)
    assert losses == expected_losses
    assert all(value.equal(expected[name]) for name, value in weights.items())
    assert none == {}
    assert all(times[name] > 0 for name in ("fwd", "bwd", "step"))
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [each["loss"] for each in steps] == losses
    # What is counted where the model computes in host memory.
    flops, _, params = get_model_profile(build("gpt").bfloat16(), kwargs=batches("gpt", 2)[1], print_profile=False)
    text = " ".join(profile.read_text().split())
    assert f" fwd flops {flops} " in text
    assert f" params {params} " in text
    assert [str(each) for each in sim.races()] == []

"""Whole steps: every wait orders something, and without it an access that nothing orders is found.

A wait of a stream for a later event of another stands for those before it. So where a wait can be forgotten alone,
those that come after it on the same stream are forgotten with it, until a race is found.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import run_ranks
from torch import nn

import zeroxide
from simulated import engines
from zeroxide.device import transfers

MODES = {
    "resident": {"stage": 2, "offload_optimizer": "cpu"},
    "resident-disk": {"stage": 1, "offload_optimizer": "nvme"},
    "resident-3": {"stage": 3, "offload_optimizer": "cpu"},
    "leaving": {"stage": 3, "offload_optimizer": "cpu"},
    "on-device": {"stage": 3},
    "on-device-shown": {"stage": 2},
    "on-device-half": {"stage": 2, "offload_optimizer": "cpu", "ratio": 0.5},
    "transient": {"stage": 3, "offload_param": "cpu", "offload_optimizer": "cpu"},
    "transient-state-disk": {"stage": 3, "offload_param": "cpu", "offload_optimizer": "nvme"},
    "transient-weights-disk": {"stage": 3, "offload_param": "nvme", "offload_optimizer": "cpu"},
    "transient-disk": {"stage": 3, "offload_param": "nvme", "offload_optimizer": "nvme"},
}


def make(mode: str, folder) -> zeroxide.Engine:
    given = dict(MODES[mode])
    ratio = {"ratio": given.pop("ratio")} if "ratio" in given else {}
    zero = {
        key: value
        if key == "stage"
        else {"device": value, **({"nvme_path": str(folder)} if value == "nvme" else ratio)}
        for key, value in given.items()
    }
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    if mode == "leaving":
        model.extend([nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)])
    # Whose weight is read in backward after the last gradient has been taken.
    model[0].requires_grad_(False)
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "zeroxide": {"device": "sim", "threads": 1},
    }
    return zeroxide.initialize(model=model, config=config)[0]


def steps(mode: str, folder, forgotten: list[int], sim) -> list:
    """The waits of two steps after a first one, in which some of them are forgotten."""
    # Where the whole model is one unit, the host waits for nothing in backward.
    with engines.followed(1 << 20 if mode == "leaving" else 8, kernels=True):
        engine = make(mode, folder)
        try:
            for number in range(3):
                if number == 1:
                    sim.reset()
                    for each in forgotten:
                        sim.forget_wait(each)
                x = torch.full((4, 8), 0.5, device="sim", dtype=torch.bfloat16, requires_grad=True)
                loss = engine(x).float().square().mean()
                engine.backward(loss)
                if number > 0:
                    evaluate(engine, x)
                engine.step()
            evaluate(engine, x)
            waits = sim.wait_list()
            # Memory that was given back is given out again, and what copies touch is taken back.
            evaluate(engine, x)
            engine.parts.context.before_change()
        finally:
            engine.destroy()
    return waits


def test_state_is_where_the_mode_says(tmp_path, sim):
    with engines.followed(kernels=True):
        found = {}
        for mode in MODES:
            engine = make(mode, tmp_path)
            found[mode] = len(engine.plan().units_on_device)
            engine.destroy()
    assert {mode: count for mode, count in found.items() if count} == {
        "on-device": 2,
        "on-device-shown": 2,
        "on-device-half": 1,
    }


def evaluate(engine: zeroxide.Engine, x: torch.Tensor) -> None:
    """Reads all weights, and the host waits for nothing."""
    with torch.no_grad():
        engine(x)


def is_missed(mode: str, folder, number: int, waits: list, sim) -> bool:
    """Whether a race is found without this wait, and without those that would stand for it."""
    forgotten = []
    for later in range(number, len(waits)):
        if waits[later].text == waits[number].text:
            forgotten.append(later)
            steps(mode, folder, forgotten, sim)
            if sim.races():
                return True
    return False


@pytest.mark.parametrize("mode", MODES)
def test_without_any_one_wait_a_race_is_found(mode, tmp_path, sim, monkeypatch):
    if mode == "leaving":
        # Memory of a gradient that is on its way down is given out again.
        monkeypatch.setattr(transfers, "LEAVING_BYTES", 0)
    sim.set_delay(0, 50, seed=4)
    waits = steps(mode, tmp_path, [], sim)
    assert sim.races() == []
    missed = []
    for number, wait in enumerate(waits):
        if wait.needed and not is_missed(mode, tmp_path, number, waits, sim):
            missed.append((number, wait.text))
    assert missed == []


RANKS = [("resident", "auto"), ("transient", "collective"), ("transient-home", "auto"), ("expanded", "collective")]


@pytest.mark.parametrize("case", RANKS, ids="-".join)
def test_without_any_one_wait_of_two_ranks_a_race_is_found(case):
    """Catches: a wait that orders nothing which needs an order."""
    for rank, result in enumerate(run_ranks(2, Path(__file__).with_name("order_ranks.py"), list(case))):
        assert result.code == 0, f"rank {rank}: {result.out[-1000:]}\n{result.err[-3000:]}"
        needed, missed = result.out.splitlines()[-1].split(" ", 1)
        assert (int(needed) > 4, missed) == (True, "[]")

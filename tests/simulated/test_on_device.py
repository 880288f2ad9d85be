"""Optimizer state at home on the device: the bits of state in host memory, and nothing that goes up or down for it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import zeroxide
from simulated import engines

STEPS = 4
RULES = {
    "adamw": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
    "adam": {"type": "Adam", "params": {"lr": 1e-2, "weight_decay": 0.1, "adam_w_mode": False}},
    "lion": {"type": "Lion", "params": {"lr": 1e-3, "weight_decay": 0.1}},
    "adagrad": {"type": "Adagrad", "params": {"lr": 1e-2, "weight_decay": 0.1}},
    "sgd": {"type": "SGD", "params": {"lr": 1e-1, "momentum": 0.9, "nesterov": True}},
}
PRECISIONS = {
    "fp32": {},
    "master-bf16": {"bf16": {"enabled": True}, "zeroxide": {"format": "fp32"}},
    "split": {"bf16": {"enabled": True}, "zeroxide": {"format": "split"}},
    "split-bf16": {"bf16": {"enabled": True}, "zeroxide": {"format": "split-bf16"}},
    "compact": {"bf16": {"enabled": True}, "zeroxide": {"format": "compact"}},
    "master-f16": {"fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}},
}
PLACES = {
    "host": {"device": "sim", "offload_optimizer": {"device": "cpu"}},
    "none": {"device": "sim"},
    "half": {"device": "sim", "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
    "all": {"device": "sim", "offload_optimizer": {"device": "cpu", "ratio": 0.0}},
    "cpu": {"device": "cpu"},
}
"""Where state is: all in host memory, all on the device by default, half, all by name, and no device at all."""


class Tied(nn.Module):
    """Two layers with one weight, a frozen one, and a parameter beside a frozen one in a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.mixed = nn.Linear(8, 8)
        self.mixed.bias.requires_grad_(False)
        self.last = nn.Linear(8, 8, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.mixed(self.frozen(self.first(x).tanh()).tanh()).tanh()
        return self.last(hidden)


@contextmanager
def engine_of(
    place: str, precision: str = "split", rule: str = "adamw", groups: bool = False, **more
) -> Iterator[zeroxide.Engine]:
    """groups: whether biases are a group of their own, with another rate and no decay."""
    torch.manual_seed(0)
    model, given = Tied(), dict(PLACES[place])
    where = given.pop("device")
    config = {
        "optimizer": RULES[rule],
        "gradient_clipping": 0.5,
        "gradient_accumulation_steps": 2,
        "steps_per_print": 10**9,
        **PRECISIONS[precision],
        **more,
    }
    config["zero_optimization"] = {"stage": 3, **given, **more.get("zero_optimization", {})}
    config["zeroxide"] = {
        "threads": 1,
        "device": where,
        **PRECISIONS[precision].get("zeroxide", {}),
        **more.get("zeroxide", {}),
    }
    parameters = [
        {"params": [model.first.weight, model.mixed.weight]},
        {"params": [model.first.bias], "lr": 3e-2, "weight_decay": 0.0},
    ]
    engine = zeroxide.initialize(model=model, config=config, model_parameters=parameters if groups else None)[0]
    try:
        yield engine
    finally:
        engine.destroy()


def batch(engine: zeroxide.Engine, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(engine.resolved_config.precision.dtype, torch.float32)
    return torch.randn(4, 8, generator=generator).to(engine.device, dtype)


def train(engine: zeroxide.Engine, first: int = 0, steps: int = STEPS) -> list[tuple[float, float]]:
    """Loss and norm of each step of two micro-batches."""
    found = []
    for step in range(first, first + steps):
        for micro in range(2):
            loss = engine(batch(engine, 2 * step + micro)).float().square().mean()
            engine.backward(loss)
            engine.step()
        found.append((loss.item(), float(engine.get_global_grad_norm())))
    return found


def outcome(engine: zeroxide.Engine) -> dict[str, torch.Tensor]:
    """Live weights, exact ones, and all state, by name."""
    found = {f"live {name}": value.cpu() for name, value in engine.module_state_dict().items()}
    for name, param in engine.module.named_parameters():
        found[f"exact {name}"] = zeroxide.safe_get_full_fp32_param(param)
        if param in engine.optimizer.state:
            found |= {f"{part} {name}": value for part, value in engine.optimizer.state[param].items()}
    return {name: value.clone() for name, value in found.items()}


def differing(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    assert got.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(got[name], value)]


@pytest.fixture(autouse=True)
def quick(sim):
    sim.set_delay(0, 100, seed=6)
    with engines.followed(kernels=True):
        yield


@pytest.mark.parametrize(("rule", "precision"), [*itertools.product(RULES, PRECISIONS)])
def test_every_rule_and_format_has_the_bits_of_state_in_host_memory(rule, precision, sim):
    """Catches: another order of sums in the norm, a clip factor or step number that differs, a gradient stored where
    one is to be added, padding or frozen weights that are updated, a step left out on one side only (the first losses
    of fp16 overflow), a missing wait."""
    found = {}
    for place in PLACES:
        with engine_of(place, precision, rule) as engine:
            losses = train(engine)
            found[place] = losses, outcome(engine), engine.skipped_steps
            on_device = len(engine.plan().units_on_device)
            assert (on_device == 0) == (place in ("host", "cpu"))
            if place in ("none", "all"):
                assert engine.device_traffic()["down"] == 0
    assert (0 < found["host"][2] < STEPS) == (precision == "master-f16")
    for place in PLACES:
        assert found[place][0] == found["cpu"][0], place
        assert differing(found[place][1], found["cpu"][1]) == [], place
        assert found[place][2] == found["cpu"][2], place
    assert [str(each) for each in sim.races()] == []


def test_groups_of_one_unit_and_of_several():
    """Catches: an update with the hyperparameters of another group."""
    found = {}
    for place in ("none", "cpu"):
        with engine_of(place, groups=True) as engine:
            found[place] = train(engine), outcome(engine)
    assert found["none"][0] == found["cpu"][0]
    assert differing(found["none"][1], found["cpu"][1]) == []

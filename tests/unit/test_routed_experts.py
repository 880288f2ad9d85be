"""Experts that no token goes to are neither read nor updated: beside plain PyTorch in float64."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from routed_models import EXPERTS, LAYERS, batches, build, config_for, train_plainly
from torch import nn

import zeroxide
from zeroxide.errors import ConfigError, ModelError

# 8 steps of fp32 AdamW beside float64. An element's update is at most about lr = 1e-2 and depends on m / sqrt(v), of
# relative error at most some 1e-5 after sums over 24 products; where a gradient nearly cancels, by more: 1e-4 of lr a
# step, 8 steps.
TOLERANCE = {"rtol": 0, "atol": 8e-6}
STEPS = 8


@contextmanager
def started(config: dict[str, Any], model: nn.Module | None = None):
    engine, *_ = zeroxide.initialize(model=build() if model is None else model, config=config)
    try:
        yield engine
    finally:
        engine.destroy()


def train(engine: Any, steps: list[list[torch.Tensor]]) -> list[float]:
    losses = []
    for each in steps:
        for ids in each:
            loss = engine(ids)
            engine.backward(loss)
            losses.append(loss.item())
            engine.step()
    return losses


def weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in engine.module_state_dict().items()}


def singly(number: int) -> list[list[torch.Tensor]]:
    return [[each] for each in batches(number)]


@pytest.mark.parametrize("home", ["nvme", "cpu", "state"])
def test_skipped_experts_are_those_without_a_gradient(tmp_path, home):
    """Catches: an expert without tokens that decays or whose moments do (its step counted), and one with tokens that is
    not updated, at every home."""
    plain, losses, _ = train_plainly(singly(STEPS), leave_out=True)
    with started(config_for(tmp_path, "skip", home)) as engine:
        assert train(engine, singly(STEPS)) == pytest.approx(losses, rel=1e-5)
        found = weights(engine)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(found[name].double(), value, **TOLERANCE, msg=lambda line, name=name: f"{name} {line}")


def test_without_skipping_they_have_gradients_of_zeros(tmp_path):
    """The two oracles differ by far more than the tolerance: catches a test that could not fail."""
    plain, _, _ = train_plainly(singly(STEPS), leave_out=False)
    other, _, _ = train_plainly(singly(STEPS), leave_out=True)
    differ = [name for name, each in plain.state_dict().items() if (each - other.state_dict()[name]).abs().max() > 1e-4]
    assert any("experts" in name for name in differ)
    with started(config_for(tmp_path, "update")) as engine:
        train(engine, singly(STEPS))
        found = weights(engine)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(found[name].double(), value, **TOLERANCE, msg=lambda line, name=name: f"{name} {line}")


def everything(engine: Any) -> dict[str, torch.Tensor]:
    """All weights, moments and counts of updates, as the optimizer's state dict and the model's have them."""
    found = weights(engine)
    state = engine.optimizer.state_dict()["state"]
    for number, each in state.items():
        found |= {f"{number}.{key}": torch.as_tensor(value).clone() for key, value in each.items()}
    return found


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("home", ["nvme", "cpu"])
@pytest.mark.parametrize("kind", [{}, {"bf16": {"enabled": True}}, {"bf16": {"enabled": True}, "format": "compact"}], ids=str)
def test_lazy_experts_have_the_bits_of_every_step(tmp_path, home, kind):
    """Beside every expert updated in every step, in host memory. Catches: a missed step that is left out, taken twice,
    in another order or with the constants of another (the learning rate changes), and random bits of another step."""
    found = []
    for mode, where in (("update", "cpu"), ("lazy", home)):
        own = {"format": kind["format"]} if "format" in kind else {}
        config = config_for(tmp_path, mode, where, **own) | {key: kind[key] for key in kind if key != "format"}
        config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-4, "warmup_max_lr": 2e-2}}
        with started(config) as engine:
            losses = train(engine, singly(STEPS))
            found.append((losses, everything(engine)))
    assert found[1][0] == found[0][0]
    assert_same_bits(found[1][1], found[0][1])


def test_lazy_experts_are_plain_adamw_with_gradients_of_zeros(tmp_path):
    plain, losses, _ = train_plainly(singly(STEPS), leave_out=False)
    with started(config_for(tmp_path, "lazy")) as engine:
        assert train(engine, singly(STEPS)) == pytest.approx(losses, rel=1e-5)
        found = weights(engine)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(found[name].double(), value, **TOLERANCE, msg=lambda line, name=name: f"{name} {line}")

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

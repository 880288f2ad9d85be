"""Every rank changes weights through `.data`, where that would be lost or be one rank's alone.

Arguments: stage, "shared", "collective" or "nvme".
"""

from __future__ import annotations

import os
import sys
import tempfile

import pytest
import torch
from torch import nn

import zeroxide
from zeroxide.errors import ModelError

torch.set_num_threads(1)
torch.manual_seed(0)
stage, home = int(sys.argv[1]), sys.argv[2]
device = {"device": "nvme", "nvme_path": tempfile.mkdtemp()} if home == "nvme" else {"device": "none"}


class Block(nn.Module):
    """Looks at its weight in forward, and changes it where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.factor: float | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.linear.weight.data.norm() > 0
        if self.factor is not None:
            self.linear.weight.data.mul_(self.factor)
        y: torch.Tensor = self.linear(x)
        return y


class Model(nn.Module):
    """Four of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


model = Model()
engine, *_ = zeroxide.initialize(
    model=model,
    config={
        "zero_optimization": {"stage": stage} | ({"offload_param": device} if stage == 3 else {}),
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zeroxide": {"threads": 1, "transport": "collective" if home == "collective" else "auto"},
    },
)


def train() -> None:
    """One step."""
    engine.backward(engine(torch.ones(2, 64)).square().mean())
    engine.step()


for _ in range(2):
    train()
for each in engine.module.layers if stage < 3 else ():
    assert each.linear.weight.data.norm() > 0
train()
if stage < 3:
    # What the engine itself writes is nobody's change.
    folder = os.path.join(os.environ["JOB_FOLDER"], "saved")
    engine.save_checkpoint(folder)
    for act in (
        lambda: engine.load_checkpoint(folder),
        lambda: zeroxide.safe_set_full_fp32_param(model.layers[1].linear.weight, torch.full((64, 64), 0.01)),
    ):
        assert all(each.data.norm() >= 0 for each in model.parameters())
        act()
        train()
engine.ranks.barrier()
if stage < 3:
    model.layers[2].linear.weight.data.mul_(0.5)
else:
    model.layers[2].factor = 0.5
with pytest.raises(ModelError, match=r"layers\.2\.linear\.weight was changed"):
    train()

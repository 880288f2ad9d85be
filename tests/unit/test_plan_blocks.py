"""Which modules are the blocks that become units."""

from __future__ import annotations

import copy

import torch
from torch import nn

import zeroxide


class Holes(nn.Module):
    """A list with items that are None, as models have for layers that a config leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), None, nn.Linear(4, 4), None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x if layer is None else torch.tanh(layer(x))
        return x


def test_a_module_list_may_have_holes():
    torch.manual_seed(0)
    model = Holes()
    plain = copy.deepcopy(model)
    engine, *_ = zeroxide.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "zero_optimization": {"stage": 3},
        },
    )
    try:
        assert [unit.name for unit in engine.plan().units] == ["layers.0", "layers.2"]
        x = torch.randn(3, 4)
        assert torch.equal(engine(x), plain(x))
    finally:
        engine.destroy()

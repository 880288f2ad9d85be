"""Which modules are the blocks that become units."""

from __future__ import annotations

import copy

import torch
from torch import nn

import zeroxide
from zeroxide.plan import discover as blocks


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


class Two(nn.Module):
    """A block of two layers."""

    def __init__(self, width: int, inner: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(width, inner)
        self.second = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class Deep(nn.Module):
    """Two lists of very many small blocks, run in turn, with a large block between."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList(Two(4) for _ in range(90))
        self.left[40] = Two(4, inner=150_000)
        self.right = nn.ModuleList(Two(4) for _ in range(60))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for at, block in enumerate(self.left):
            x = block(x)
            if at < len(self.right):
                x = self.right[at](x)
        return x


def names_of(engine: object) -> list[str]:
    return [unit.name for unit in engine.plan().units]  # type: ignore[attr-defined]


def train(config: dict[str, object], steps: int = 3) -> tuple[list[str], list[torch.Tensor], int]:
    """Names of units, weights after training, and disk requests."""
    torch.manual_seed(0)
    engine, *_ = zeroxide.initialize(model=Deep(), config=config)
    try:
        for step in range(steps):
            torch.manual_seed(step)
            engine.backward(engine(torch.randn(3, 4)).square().mean())
            engine.step()
        engine.finish_step()
        requests = sum(engine.io()[key] for key in ("reads", "writes"))
        return names_of(engine), list(engine.module_state_dict().values()), requests
    finally:
        engine.destroy()


def test_very_many_small_blocks_share_units(tmp_path, monkeypatch):
    """Catches: blocks of two lists, or a large one, in one unit with others; disk transfers for each block; other
    bits."""
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)},
            "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)},
        },
    }
    names, weights, requests = train(config)
    assert names == ["left.0 to left.39", "left.40", "left.41 to left.89", "right.0 to right.59"]
    monkeypatch.setattr(blocks, "MANY", 10_000)
    apart, expected, many = train(config)
    assert len(apart) == 150
    assert all(map(torch.equal, weights, expected))
    assert requests < many / 5

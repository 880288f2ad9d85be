"""torch.compile of a model on a device: graphs end where weights are brought, and the bits are those without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import zeroxide
from simulated import engines
from zeroxide.zero import saved_activations

CPU = {"offload_optimizer": {"device": "cpu"}}
MODES = {
    "resident": {"stage": 2, **CPU},
    "resident-3": {"stage": 3, **CPU},
    "transient": {"stage": 3, "offload_param": {"device": "cpu"}, **CPU},
    "on-device": {"stage": 3},
    "activations": {"stage": 3, "offload_param": {"device": "cpu"}, **CPU},
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h, self.out = nn.ModuleList(Block() for _ in range(2)), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.h:
            x = block(x)
        return self.out(x).square().mean()


def trained(mode: str, how: str, sim) -> list[float]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model: nn.Module = Net()
    if how == "units":
        for at, block in enumerate(model.h):
            model.h[at] = torch.compile(block, backend="aot_eager")
    elif how == "whole":
        model = torch.compile(model, backend="aot_eager")
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "gradient_clipping": 0.5,
        "zero_optimization": MODES[mode],
        "activation_checkpointing": {"cpu_checkpointing": mode == "activations"},
        "zeroxide": {"device": "sim", "threads": 1},
    }
    found = []
    with engines.followed(kernels=True):
        engine = zeroxide.initialize(model=model, config=config)[0]
        try:
            for seed in range(3):
                loss = engine(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).to("sim"))
                engine.backward(loss)
                engine.step()
                found += [loss.item(), float(engine.get_global_grad_norm())]
            assert (engine.device_traffic()["activations_down"] > 0) == (mode == "activations")
        finally:
            engine.destroy()
    assert [str(each) for each in sim.races()] == []
    assert (counters["stats"]["calls_captured"] > 0) == (how != "plain")
    return found


@pytest.mark.parametrize(("mode", "how"), [*((mode, "units") for mode in MODES), ("resident-3", "whole")])
def test_compiled_parts_have_the_bits_of_plain_ones(mode, how, sim, monkeypatch):
    """Catches: a weight that a graph keeps, or reads when it is not there; hooks that are traced once and for all."""
    monkeypatch.setattr(saved_activations, "MIN_BYTES", 64)
    sim.set_delay(0, 50, seed=9)
    assert trained(mode, how, sim) == trained(mode, "plain", sim)

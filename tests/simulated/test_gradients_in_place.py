"""Gradients that the device copies straight to where the core keeps them, and those that pass through blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import zeroxide
from simulated import engines
from zeroxide.device import transfers
from zeroxide.device.transfers import Transfers

WIDTH = 16


@pytest.fixture(autouse=True)
def quick(sim):
    sim.set_delay(0, 100, seed=3)


class Twice(nn.Module):
    """Uses its layers twice, in regions whose backward is one of its own: each gradient comes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.blocks, *self.blocks):
            x = checkpoint(block, x, use_reentrant=True)
        return x


class Once(Twice):
    """Uses each once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def train(kind: type[nn.Module], zero: dict, where: str = "sim", micro_batches: int = 1, **more) -> list[torch.Tensor]:
    """What the weights are after two steps, and the norm of the last one."""
    torch.manual_seed(0)
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "gradient_clipping": 1.0,
        "gradient_accumulation_steps": micro_batches,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "zeroxide": {"device": where, "threads": 1},
    }
    with engines.followed():
        engine = zeroxide.initialize(model=kind(), config=config | more)[0]
        for seed in range(2 * micro_batches):
            given = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
            loss = engine(given.to(where).requires_grad_()).float().square().mean()
            engine.backward(loss)
            engine.step()
        found = [value.cpu() for value in engine.module_state_dict().values()]
        norm = torch.tensor(engine.get_global_grad_norm())
        engine.destroy()
    return [*found, norm]


@pytest.fixture
def counted(monkeypatch):
    """How many copies down have gone each way."""
    found = {"bring_into": 0, "bring_down": 0}
    for name in found:
        bring = getattr(Transfers, name)

        def brought(self, *given, name=name, bring=bring):
            found[name] += 1
            return bring(self, *given)

        monkeypatch.setattr(Transfers, name, brought)
    return found


CPU = {"stage": 3, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("zero", "micro_batches", "more", "straight", "through"),
    [
        (CPU, 1, {}, 8, 0),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, 1, {}, 8, 0),
        ({**CPU, "offload_param": {"device": "cpu"}}, 1, {}, 8, 0),
        (CPU, 3, {}, 8, 16),
        (CPU, 1, {"data_types": {"grad_accum_dtype": "fp32"}}, 0, 8),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, 1, {}, 0, 8),
    ],
    ids=["stage 3", "stage 2", "offloaded", "accumulated", "fp32", "disk"],
)
def test_the_first_gradient_of_a_step_goes_straight(
    zero, micro_batches, more, straight, through, counted, tmp_path, sim
):
    """Catches: a sum that the next gradient overwrites, a gradient in another dtype than its place, a place whose
    memory goes back to the system while the device knows it."""
    if zero["offload_optimizer"]["device"] == "nvme":
        zero = {**zero, "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}
    found = train(Once, zero, micro_batches=micro_batches, **more)
    assert (counted["bring_into"], counted["bring_down"]) == (straight, through)
    expected = train(Once, zero, "cpu", micro_batches, **more)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert [str(each) for each in sim.races()] == []


@pytest.mark.parametrize("zero", [CPU, {**CPU, "stage": 2}], ids=["stage 3", "stage 2"])
def test_a_gradient_that_comes_twice_in_a_backward_is_added(zero, counted, sim):
    found = train(Twice, zero)
    assert (counted["bring_into"], counted["bring_down"]) == (8, 8)
    expected = train(Twice, zero, "cpu")
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert [str(each) for each in sim.races()] == []


def test_what_leaves_is_kept_on_the_device_up_to_a_bound(monkeypatch, sim):
    """Of what leaves the device keeps the last two tensors: what left before them is let go by the stream, and its
    memory is given out again after its copy."""
    monkeypatch.setattr(transfers, "LEAVING_BYTES", 0)
    kept, bring = [], Transfers.bring_into

    def brought(self, source, target):
        found = bring(self, source, target)
        kept.append(sum(each.held for each in self._leaving))
        return found

    monkeypatch.setattr(Transfers, "bring_into", brought)
    train(Once, CPU)
    # A bias of 32 bytes leaves before each weight.
    assert max(kept) == 512 + 32
    assert len(kept) == 8
    assert [str(each) for each in sim.races()] == []


def test_blocks_are_enough_for_a_gradient_that_passes_through_them():
    assert transfers.blocks_down(0) == transfers.blocks_down(4 * transfers.BLOCK_BYTES) == 4
    assert transfers.blocks_down(4 * transfers.BLOCK_BYTES + 1) == 5
    assert transfers.blocks_down(1 << 40) == 32
    assert transfers.pinned_bytes(torch.device("cpu"), 32) == 0
    assert transfers.pinned_bytes(torch.device("sim"), 5) == 9 * transfers.BLOCK_BYTES

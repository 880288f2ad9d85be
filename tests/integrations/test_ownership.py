"""What a module is when its engine gives it back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import zeroxide
from zeroxide.integrations.ownership import Ownership, owner_of

TRAINED = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}


class Normed(nn.Module):
    """A batch norm, whose statistics go to the dtype of its weights, and buffers of all kinds beside it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        # No bf16 numbers, as trained statistics are.
        self.norm.running_mean.normal_()
        self.register_buffer("shift", torch.randn(4, dtype=torch.float64), persistent=False)
        self.up.register_buffer("shift", self.shift)
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("nothing", None)

    def forward(self, x):
        return self.norm(self.up(x)) + self.shift.to(x.dtype)


def owned(model, *, trains, dtype="bf16", **config):
    owner = Ownership.of(model, trains=trains)
    config |= {dtype: {"enabled": True}, "zeroxide": {"device": "cpu", "threads": 1}} | (TRAINED if trains else {})
    engine, *_ = zeroxide.initialize(model=model, config=config)
    owner.belongs_to(model, engine)
    return owner, engine


def train(engine, dtype=torch.bfloat16):
    engine.train()
    engine.backward(engine(torch.randn(8, 3).to(dtype)).float().square().mean())
    engine.step()


def kinds(model):
    named = [*model.named_parameters(), *model.named_buffers(remove_duplicate=False)]
    return {name: (each.dtype, each.device) for name, each in named}


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("cast", [False, True])
def test_a_module_that_was_trained_computes_again(stage, dtype, cast):
    """Catches: statistics that stay in the dtype of training beside fp32 weights, those of before training, a shared
    buffer that becomes two."""
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    model = Normed()
    before = kinds(model)
    more = {"data_types": {"buffer_dtype": dtype}} if cast else {}
    owner, engine = owned(model, trains=True, dtype=dtype, zero_optimization={"stage": stage}, **more)
    assert owner_of(model) is owner
    train(engine, low)
    statistics = model.norm.running_mean.clone()
    assert statistics.dtype == low
    model.seen += 2
    model.shift += 2
    shift = model.shift.double()
    owner.give_back()
    assert owner_of(model) is None
    assert kinds(model) == before
    assert model.norm.running_mean.equal(statistics.float())
    assert model.shift is model.up.shift
    assert model.shift.equal(shift)
    assert int(model.seen) == 2
    assert int(model.norm.num_batches_tracked) == 1
    model(torch.randn(8, 3)).sum().backward()
    # Another engine takes it, and gives it back.
    owner, engine = owned(model, trains=True, dtype=dtype, zero_optimization={"stage": stage})
    train(engine, low)
    owner.give_back()
    assert kinds(model) == before


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_what_no_forward_has_changed_is_what_it_was(trains, cast):
    """Catches: statistics and constants that are rounded for good by an evaluation, or before the first step."""
    model = Normed()
    buffers = dict(model.named_buffers(remove_duplicate=False))
    values = copy.deepcopy(model).state_dict()
    more = {"data_types": {"buffer_dtype": "bf16"}} if cast else {}
    owner, engine = owned(model, trains=trains, **more)
    engine.eval()
    engine(torch.randn(8, 3).bfloat16())
    assert model.norm.running_mean.dtype == torch.bfloat16
    owner.give_back()
    assert all(each is buffers[name] for name, each in model.named_buffers(remove_duplicate=False))
    assert all(each.equal(values[name]) for name, each in model.state_dict().items() if "running" in name)


def test_buffers_that_a_module_makes_itself_are_left_alone():
    """Catches: another buffer of an old name that is made a number of the old kind, one under a new name, one less."""
    model = Normed()
    owner, _ = owned(model, trains=True)
    model.seen, model.late = torch.tensor([0.5]), nn.Buffer(torch.ones(2).bfloat16())
    del model._buffers["nothing"]
    model.norm.running_mean = torch.ones(5).bfloat16()
    model.norm.running_var = model.norm.running_var.view(2, 2)
    owner.give_back()
    assert model.seen.equal(torch.tensor([0.5]))
    assert model.late.dtype == torch.bfloat16
    assert model.norm.running_mean.equal(torch.ones(5))
    assert model.norm.running_var.equal(torch.ones(2, 2))


def test_buffers_from_the_meta_device_come_back_to_host_memory():
    """Catches: a device without values that buffers go back to."""
    with torch.device("meta"):
        model = nn.BatchNorm1d(4)

    owner = Ownership.of(model, trains=True)
    model.to_empty(device="cpu")
    model.reset_parameters()
    engine, *_ = zeroxide.initialize(
        model=model, config=TRAINED | {"bf16": {"enabled": True}, "zeroxide": {"device": "cpu", "threads": 1}}
    )
    owner.belongs_to(model, engine)
    owner.give_back()
    assert model.running_var.equal(torch.ones(4))
    assert {each for _, each in kinds(model).values()} == {torch.device("cpu")}
    model(torch.randn(8, 4))

"""GatheredParameters that is interrupted on the way in or out: no parameter is left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from running import Mode, assert_released, config_of, started
from test_guard import Net, rows, train

import zeroxide
from zeroxide import zero
from zeroxide.errors import ModelError
from zeroxide.zero.param import ShardedParam
from zeroxide.zero.unit import Unit

COUNT = len(list(Net().parameters()))


class Interrupt:
    """Calls of a method until call number `at`, which is interrupted before or after its work."""

    def __init__(self, monkeypatch, owner, name, at, after=False):
        inner = getattr(owner, name)
        self.calls = 0

        def call(*args, **kwargs):
            number, self.calls = self.calls, self.calls + 1
            if number == at and not after:
                raise KeyboardInterrupt
            result = inner(*args, **kwargs)
            if number == at:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", [0, 2, COUNT - 1])
@pytest.mark.parametrize(("owner", "name"), [(ShardedParam, "read_live"), (Unit, "lend"), (ShardedParam, "open")])
def test_interrupted_on_the_way_in(owner, name, at, after, tmp_path, monkeypatch):
    model = Net()
    with started(model, config=config_of(Mode(), tmp_path, "fp32")) as engine:
        before = copy.deepcopy(model.state_dict())
        with monkeypatch.context() as patch:
            Interrupt(patch, owner, name, at, after)
            with pytest.raises(KeyboardInterrupt), zero.GatheredParameters(model, modifier_rank=0):
                raise AssertionError("entered")
        for param in model.parameters():
            assert param.numel() == 0
            assert param._handle.holds == param._handle.writers == 0
        for name_, value in model.state_dict().items():
            assert torch.equal(value, before[name_]), name_
        train(engine, 0)
        assert_released(engine)


@pytest.mark.parametrize("at", [0, 2, COUNT - 1])
@pytest.mark.parametrize(
    ("owner", "name"), [(ShardedParam, "_take_changes"), (Unit, "take_back"), (ShardedParam, "close")]
)
def test_interrupted_on_the_way_out(owner, name, at, tmp_path, monkeypatch):
    """Every parameter is as it was or as it was made; none is left behind, and all follow the engine afterwards."""
    model = Net()
    with started(model, config=config_of(Mode(), tmp_path, "fp32")) as engine:
        before = copy.deepcopy(model.state_dict())
        with monkeypatch.context() as patch:
            Interrupt(patch, owner, name, at, after=True)
            with pytest.raises(KeyboardInterrupt), zero.GatheredParameters(model, modifier_rank=0):
                [param.data.fill_(0.25) for param in model.parameters()]
        for param in model.parameters():
            assert param.numel() == 0
            assert param._handle.holds == param._handle.writers == 0
        for name_, value in model.state_dict().items():
            assert torch.equal(value, before[name_]) or (value == 0.25).all(), name_
        train(engine, 0)
        assert_released(engine)


def test_an_inner_change_is_no_loss_of_the_outer_context(tmp_path):
    model = Net()
    with started(model, config=config_of(Mode(), tmp_path, "fp32")) as engine:
        with zero.GatheredParameters(model), zero.GatheredParameters(model.first.weight, modifier_rank=0):
            model.first.weight.data.fill_(0.5)
        assert (zeroxide.safe_get_full_fp32_param(model.first.weight) == 0.5).all()
        inner = zero.GatheredParameters(model.first.weight)
        with zero.GatheredParameters(model, modifier_rank=0), inner, torch.no_grad():
            model.first.weight.fill_(0.75)
        assert (zeroxide.safe_get_full_fp32_param(model.first.weight) == 0.75).all()
        lost = zero.GatheredParameters(model)
        with pytest.raises(ModelError, match=r"first\.weight was changed"), lost, torch.no_grad():
            model.first.weight.fill_(0.5)
        assert (zeroxide.safe_get_full_fp32_param(model.first.weight) == 0.75).all()
        with pytest.raises(ModelError, match=r"first\.weight was changed"), zero.GatheredParameters(model):
            model.first.weight.data[0] = 0.5
        with zero.GatheredParameters(model):
            assert float(model.first.weight.data.mean()) == 0.75  # a look is no change
        engine(rows(0))

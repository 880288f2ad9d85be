"""Leaf modules and external parameters: how they change the units, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Block, next_token_loss
from running import Mode, config_of, started
from torch import nn

import zeroxide
from zeroxide import zero
from zeroxide.errors import ModelError
from zeroxide.plan import discover


class Moe(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(48, 2)
        self.experts = nn.ModuleList([Block(), Block()])

    def forward(self, hidden):
        return self.experts[int(self.gate(hidden).sum() > 0)](hidden)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(48, 48)
        self.moe = Moe()

    def forward(self, hidden):
        return self.moe(self.mix(hidden))


class Model(nn.Module):
    """An expert layer at the root, and two of them in blocks."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(61, 48)
        self.first = Moe()
        self.h = nn.ModuleList([Layer(), Layer()])

    def forward(self, input_ids):
        hidden = self.first(self.wte(input_ids))
        for layer in self.h:
            hidden = layer(hidden)
        return next_token_loss(hidden @ self.wte.weight.t(), input_ids)


def ids(seed=0):
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(seed))


def model_of(seed=0):
    torch.manual_seed(seed)
    return Model()


def units_of(engine):
    return {unit.name: {entry.name for entry in unit.params} for unit in engine.plan().units}


def below(model, prefix):
    return {name for name, _ in model.named_parameters() if name.startswith(prefix + ".")}


def test_marks_are_set_found_and_taken_away():
    model = Model()
    leaves = [model.first, model.h[0].moe, model.h[1].moe]
    assert zero.set_z3_leaf_modules(model, ["Moe"]) == leaves
    assert zero.get_z3_leaf_modules(model) == leaves
    assert zero.z3_leaf_module(model.first)
    assert zero.z3_leaf_parameter(model.first.gate.weight)
    assert not zero.z3_leaf_parameter(model.wte.weight)
    assert zero.unset_z3_leaf_modules_by_suffix(model, [".moe"]) == leaves[1:]
    assert zero.get_z3_leaf_modules(model) == leaves[:1]
    assert not zero.z3_leaf_parameter(model.h[0].moe.gate.weight)
    assert zero.unset_z3_leaf_modules(model, [Moe])
    found = zero.set_z3_leaf_modules_by_name(model, ["h.1.moe", "no", "first"], True, False)
    assert found == ([model.h[1].moe, model.first], ["no"])
    assert zero.set_z3_leaf_modules_by_suffix(model, ["1.moe"], flag=False) == ([model.h[1].moe], [])
    assert zero.get_z3_leaf_modules(model) == [model.first]
    assert zero.unset_z3_leaf_modules_by_name(model, ["first"]) == [model.first]
    zero.set_z3_leaf_module(model, True)
    assert zero.get_z3_leaf_modules(model) == [model]
    for call, wanted, found in (
        (zero.set_z3_leaf_modules, [nn.Conv2d], []),
        (zero.set_z3_leaf_modules_by_name, ["no"], ([], ["no"])),
    ):
        with pytest.raises(ModelError, match="no module of Model is"):
            call(model, wanted)
        assert call(model, wanted, raise_if_not_found=False) == found


@pytest.mark.parametrize("way", ["call", "config"])
def test_a_leaf_module_is_one_unit(way, tmp_path):
    model = model_of()
    plain = copy.deepcopy(model)
    config = config_of(Mode("nvme", "nvme"), tmp_path, "fp32")
    if way == "call":
        zero.set_z3_leaf_modules(model, [Moe])
    else:
        config["zero_optimization"]["leaf_module"] = {"classes": ["Moe", "Unknown"]}
    with started(model, config=config) as engine:
        assert units_of(engine)["first"] == below(model, "first")
        assert units_of(engine)["h.0"] == below(model, "h.0")
        for step in range(3):
            loss = engine(ids(step))
            assert torch.equal(loss, plain(ids(step)))
            engine.backward(loss)
            plain.zero_grad()
            plain(ids(step)).backward()
            for (name, param), mine in zip(plain.named_parameters(), model.parameters(), strict=True):
                got = zeroxide.safe_get_full_grad(mine)
                assert (got is None) == (param.grad is None), name
                assert got is None or torch.equal(got, param.grad), name
            engine.zero_grad()
        with pytest.raises(ModelError, match=r"before zeroxide\.initialize"):
            zero.set_z3_leaf_modules(model, [Layer])


def test_without_the_mark_experts_are_units_of_their_own(tmp_path):
    with started(model_of(), config=config_of(Mode(), tmp_path)) as engine:
        assert "first.experts.0" in units_of(engine)


def test_a_leaf_module_is_not_cut(tmp_path, monkeypatch):
    model = model_of()
    zero.set_z3_leaf_modules(model, [Moe])
    # Less than an expert layer, more than any one parameter.
    monkeypatch.setattr(discover, "DEFAULT_UNIT_BYTES", 20 << 10)
    with started(model, config=config_of(Mode(), tmp_path)) as engine:
        units = units_of(engine)
        for path in ("first", "h.0.moe", "h.1.moe"):
            assert below(model, path) in units.values(), path
        assert {"h.0.mix.weight", "h.0.mix.bias"} in units.values()
        engine.backward(engine(ids()))
        engine.step()


def test_a_whole_model_can_be_one_unit(tmp_path):
    model = model_of()
    zero.set_z3_leaf_module(model, True)
    with started(model, config=config_of(Mode(), tmp_path)) as engine:
        assert len(engine.plan().units) == 1
        engine.backward(engine(ids()))


def test_a_leaf_name_that_is_not_there_is_refused(tmp_path):
    config = config_of(Mode(), tmp_path)
    config["zero_optimization"]["leaf_module"] = {"names": ["nowhere"]}
    with pytest.raises(ModelError, match="'nowhere'"), started(model_of(), config=config):
        pass


class Borrows(nn.Module):
    """Multiplies by the weight of a linear layer that another module owns."""

    def __init__(self, owner, registered=True):
        super().__init__()
        self.lin = nn.Linear(48, 48)
        self.owner = [owner]
        if registered:
            zero.register_external_parameter(self, owner.weight)
            zero.register_external_parameter(self, owner.weight)

    def forward(self, hidden):
        return self.lin(hidden) + hidden @ self.owner[0].weight.t()


class Borrowing(nn.Module):
    def __init__(self, registered=True):
        super().__init__()
        self.wte = nn.Embedding(61, 48)
        self.h = nn.ModuleList([Block(), Block()])
        self.tail = nn.ModuleList([Borrows(self.h[0].mix, registered) for _ in range(2)])

    def forward(self, input_ids):
        hidden = self.wte(input_ids)
        for block in [*self.h, *self.tail]:
            hidden = block(hidden)
        return next_token_loss(hidden @ self.wte.weight.t(), input_ids)


@pytest.mark.parametrize("mode", [Mode(), Mode("nvme", "nvme", "fp32", prefetch=0)], ids=str)
def test_an_external_parameter_is_there_when_its_users_run(mode, tmp_path):
    torch.manual_seed(0)
    model = Borrowing()
    torch.manual_seed(0)
    plain = Borrowing(registered=False)
    with started(model, config=config_of(mode, tmp_path, "fp32")) as engine:
        for step in range(2):
            loss = engine(ids(step))
            assert torch.equal(loss, plain(ids(step)))
            engine.backward(loss)
            plain.zero_grad()
            plain(ids(step)).backward()
            for (name, param), mine in zip(plain.named_parameters(), model.parameters(), strict=True):
                assert torch.equal(zeroxide.safe_get_full_grad(mine), param.grad), name
            engine.zero_grad()
        zero.register_external_parameter(model.tail[0], model.h[0].mix.weight)
        with pytest.raises(ModelError, match="call it before"):
            zero.register_external_parameter(model.tail[0], model.h[1].up.weight)


def test_an_unregistered_parameter_of_another_module_is_there_as_well(tmp_path):
    model = Borrowing()
    plain = copy.deepcopy(model)
    for user in model.tail:
        zero.unregister_external_parameter(user, model.h[0].mix.weight)
    on_disk = config_of(Mode("nvme", "nvme", prefetch=0), tmp_path, "fp32")
    with started(model, config=on_disk) as engine:
        assert torch.equal(engine(ids()), plain(ids()))
    with pytest.raises(ModelError, match="has not registered"):
        zero.unregister_external_parameter(nn.Linear(2, 2), nn.Parameter(torch.ones(1)))
    with pytest.raises(ModelError, match="expected a parameter, got Tensor"):
        zero.register_external_parameter(nn.Linear(2, 2), torch.ones(1))

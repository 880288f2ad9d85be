"""Copies and pickles of an engine's modules: plain modules that know nothing of the engine."""

from __future__ import annotations

import copy
import io
import pickle
import pickletools
from collections import OrderedDict
from typing import Any

import pytest
import torch
from models import build, next_token_loss
from running import Mode, config_of, started
from torch import nn
from torch.optim.swa_utils import AveragedModel

import zeroxide
from zeroxide import zero
from zeroxide.errors import ModelError
from zeroxide.zero.hook_handle import Hook, PlainCopies
from zeroxide.zero.reduce import large_weights as large

STAGES = [0, 2, 3]


def settings(directory, stage, mode=None, **more):
    config = config_of(mode or Mode(), directory, "fp32", **more)
    config["zero_optimization"] |= {"stage": stage}
    if stage < 3:
        del config["zero_optimization"]["offload_param"]
    return config


def ids(seed=0):
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(seed))


def train(engine, seed=0):
    engine.backward(engine(ids(seed)))
    engine.step()


def tables(module):
    """Every table of hooks and of what is known about them, of all modules together."""
    found: dict[str, dict[Any, Any]] = {}
    for each in module.modules():
        for name, value in vars(each).items():
            if isinstance(value, OrderedDict):
                found.setdefault(name, {}).update(value)
    return found


def by_pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    assert "zeroxide" not in " ".join(str(arg) for _, arg, _ in pickletools.genops(pickle.dumps(model)))
    file.seek(0)
    return torch.load(file, weights_only=False)


def assert_plain(copied, model):
    """The copy has what a model has that never saw an engine."""
    pristine = build("gpt")
    assert tables(copied) == tables(pristine)
    for (path, one), (_, other) in zip(copied.named_modules(), pristine.named_modules(), strict=True):
        assert vars(one).keys() == vars(other).keys(), path
        assert type(one) is type(other)
    for name, param in copied.named_parameters():
        assert type(param) is nn.Parameter, name
        assert vars(param) == {}, name
    own = {param.untyped_storage().data_ptr() for param in model.parameters() if param.numel()}
    assert own.isdisjoint(param.untyped_storage().data_ptr() for param in copied.parameters())
    assert copied.head.weight is copied.wte.weight
    assert copied.wte.sparse is False


@pytest.mark.parametrize("make", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_copy_is_a_plain_module(stage, make, tmp_path, monkeypatch):
    """The oracle is a model of plain torch with the weights that the engine says it has.

    Catches: hooks, a forward or sparse gradients left in the copy, and storage that is the engine's.
    """
    # Embedding and head are tied, and both take the lean paths.
    monkeypatch.setattr(large, "LARGE", 1 << 10)
    model = build("gpt")
    with started(model, config=settings(tmp_path, stage)) as engine:
        assert isinstance(model.wte.weight, large.LargeParameter)
        train(engine)
        exact = {name: zeroxide.safe_get_full_fp32_param(param) for name, param in model.named_parameters()}
        with zero.GatheredParameters(model):
            copied = make(model)
        train(engine, 1)
    assert_plain(copied, model)
    plain = build("gpt")
    with torch.no_grad():
        for name, param in plain.named_parameters():
            param.copy_(exact[name])
    for each in (copied, plain):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3)
        for step in range(2):
            optimizer.zero_grad()
            each(ids(step)).backward()
            optimizer.step()
    for name, param in plain.named_parameters():
        assert torch.equal(copied.get_parameter(name), param), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_copy_trains_in_an_engine_of_its_own(stage, tmp_path):
    model = build("gpt")
    with started(model, config=settings(tmp_path, stage)) as engine:
        with zero.GatheredParameters(model):
            copied = copy.deepcopy(model)
        with started(copied, config=settings(tmp_path, stage)) as other:
            for step in range(2):
                train(engine, step)
                train(other, step)
            for name, param in model.named_parameters():
                twin = zeroxide.safe_get_full_fp32_param(copied.get_parameter(name))
                assert torch.equal(zeroxide.safe_get_full_fp32_param(param), twin), name
            with zero.GatheredParameters(copied):
                assert_plain(copy.deepcopy(copied), copied)


def test_a_block_can_be_copied_and_hooks_of_users_stay(tmp_path):
    """Catches: tables left out as a whole, and keyword marks that stay behind under numbers of hooks that are gone."""
    model, calls = build("gpt"), []
    user = model.h[0].register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(sorted(kwargs)), with_kwargs=True
    )
    with started(model, config=settings(tmp_path, 3)) as engine:
        with zero.GatheredParameters(model.h[0]):
            copied = copy.deepcopy(model.h[0])
        assert list(copied._forward_pre_hooks) == [user.id]
        assert list(copied._forward_pre_hooks_with_kwargs) == [user.id]
        assert not copied._forward_hooks_always_called
        copied(torch.zeros(1, 2, 48))
        assert calls == [[]]
        user.remove()
        train(engine)
        assert calls == [[]]


@pytest.mark.parametrize("make", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
def test_a_copy_can_be_made_anywhere_where_parameters_are_visible(make, tmp_path):
    """Its tensors have storage of their own size, not that of their unit."""
    model = build("gpt")
    with started(model, config=settings(tmp_path, 2)) as engine:
        train(engine)
        copied = make(model.h[0])
        assert sum(param.untyped_storage().nbytes() for param in copied.parameters()) == sum(
            param.nbytes for param in model.h[0].parameters()
        )
        with torch.no_grad():
            hidden = torch.randn(2, 12, 48)
            assert torch.equal(copied(hidden), model.h[0](hidden))


def test_copies_of_empty_parameters_are_refused(tmp_path):
    model = build("gpt")
    with started(model, config=settings(tmp_path, 3)):
        for act in (copy.deepcopy, by_pickle, lambda each: AveragedModel(each), lambda each: copy.deepcopy(each.h[1])):
            with pytest.raises(ModelError, match="GatheredParameters"):
                act(model)


@pytest.mark.parametrize("stage", STAGES)
def test_an_average_of_the_weights_follows_the_model(stage, tmp_path):
    """An exponential average, as its users write it, beside the same in float64 over the weights that were there.

    Each of 3 averages rounds 3 times, to 2^-24 of weights of at most 1.3: 3 * 3 * 1.3 / 2^24 < 1e-6.
    """
    model = build("gpt")
    with started(model, config=settings(tmp_path, stage)) as engine:
        with zero.GatheredParameters(model):
            averaged = AveragedModel(model, avg_fn=lambda old, new, count: 0.9 * old + 0.1 * new)
            averaged.update_parameters(model)
            expected = {name: param.detach().double() for name, param in model.named_parameters()}
        for step in range(3):
            train(engine, step)
            with zero.GatheredParameters(model):
                averaged.update_parameters(model)
            for name, param in model.named_parameters():
                new = zeroxide.safe_get_full_fp32_param(param).double()
                expected[name] = 0.9 * expected[name] + 0.1 * new
    for name, param in averaged.module.named_parameters():
        assert (param.double() - expected[name]).abs().max() <= 1e-6, name


@pytest.mark.parametrize("stage", STAGES)
def test_a_shallow_copy_shares_the_engine(stage, tmp_path):
    """Its parameters are the module's, so its hooks must bring the weights; afterwards they do nothing."""
    model = build("gpt")
    plain = copy.deepcopy(model)
    with started(model, config=settings(tmp_path, stage)):
        shallow = copy.copy(model.h[0])
        hidden = torch.randn(2, 12, 48)
        with torch.no_grad():
            assert torch.equal(shallow(hidden), plain.h[0](hidden))
        held = [value for value in tables(shallow)["_forward_pre_hooks"].values() if isinstance(value, Hook)]
        assert held
        with zero.GatheredParameters(model):
            assert tables(copy.deepcopy(shallow)) == tables(plain.h[0])
    assert {each.args for each in held} == {()}
    if stage < 3:
        assert torch.equal(shallow(hidden), plain.h[0](hidden))


def test_an_engine_cannot_be_copied(tmp_path):
    with started(build("gpt"), config=settings(tmp_path, 0)) as engine:
        for act in (copy.copy, copy.deepcopy, pickle.dumps, lambda each: torch.save(each, io.BytesIO())):
            with pytest.raises(ModelError, match="an engine cannot be copied or pickled"):
                act(engine)


class Own(nn.Linear):
    """Says itself how it is copied."""

    def __deepcopy__(self, memo):
        made = Own(self.in_features, self.out_features)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


class WithState(nn.Linear):
    """Says itself what is copied."""

    def __getstate__(self):
        return {**self.__dict__, "from_state": True}


@pytest.mark.parametrize("kind", [Own, WithState])
def test_classes_that_copy_themselves_are_respected(kind, tmp_path):
    model = nn.Sequential(kind(8, 8), nn.Linear(8, 8))
    plain = copy.deepcopy(model)
    with started(model, config=settings(tmp_path, 3)), zero.GatheredParameters(model):
        copied = copy.deepcopy(model)
    assert hasattr(copied[0], "from_state") is (kind is WithState)
    x = torch.randn(3, 8)
    assert torch.equal(copied(x), plain(x))
    again = pickle.loads(pickle.dumps(copied))
    assert torch.equal(again(x), plain(x))


def test_nothing_stays_on_a_module_after_its_engine(tmp_path):
    model = build("gpt")
    with (
        started(model, config=settings(tmp_path, 0)),
        pytest.raises(ModelError, match=r"the __dict__ of Gpt was to be copied or pickled"),
    ):
        copy.deepcopy(vars(model))
    assert_plain(model, build("gpt"))


def test_two_owners_of_one_module_do_not_remove_one_another():
    model = nn.Linear(2, 2)
    first, second = PlainCopies(model), PlainCopies(model)
    second.close()
    assert "__getstate__" in vars(model)
    first.close()
    assert "__getstate__" not in vars(model)


def test_targets_of_copied_steps_are_unaffected(tmp_path):
    """A loss through a copy reaches the copy's parameters only."""
    model = build("gpt")
    with started(model, config=settings(tmp_path, 0)) as engine:
        copied = copy.deepcopy(model)
        next_token_loss(copied.logits(ids()), ids()).backward()
        assert all(param.grad is not None for param in copied.parameters())
        assert not any(engine.parts.core().accumulated())

"""Large weights: their lean gradients are those of plain torch, bit for bit, and only where plain torch has them.

The oracle is the same model in plain torch. A gradient in fp32 that is the only one since the last step is taken as it
is, so its bits are compared.
"""

from __future__ import annotations

import copy

import pytest
import torch
from running import Mode, config_of, started
from torch import nn
from torch.nn import functional

import zeroxide
from zeroxide.zero.reduce import large_weights as large

WIDTH, WORDS = 24, 50


@pytest.fixture(autouse=True)
def small_large(monkeypatch):
    monkeypatch.setattr(large, "LARGE", WIDTH * WORDS)
    monkeypatch.setattr(large, "PART", 7 * WIDTH)


@pytest.fixture(params=[Mode(), Mode("nvme", "nvme", prefetch=0)], ids=str)
def config(request, tmp_path):
    return config_of(request.param, tmp_path, "fp32")


class Model(nn.Module):
    """An embedding and a projection, each used as `uses` says."""

    def __init__(self, uses="once", tied=False, padding=None):
        super().__init__()
        torch.manual_seed(0)
        self.uses = uses
        self.wte = nn.Embedding(WORDS, WIDTH, padding_idx=padding)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, ids):
        x = self.wte(ids)
        if self.uses == "embedding twice":
            x = x + 0.5 * self.wte((ids + 1) % WORDS)
        x = torch.tanh(self.mix(x))
        if self.uses == "tied by hand":
            return functional.linear(x, self.wte.weight).logsumexp(-1).mean() + self.head(x).square().mean()
        if self.uses == "transposed by hand":
            return (x @ self.wte.weight.t()).logsumexp(-1).mean() + self.head(x).square().mean()
        if self.uses == "keyword":
            return self.head(input=x).logsumexp(-1).mean()
        if self.uses == "head twice":
            return self.head(x).logsumexp(-1).mean() + self.head(x.flip(0)).square().mean()
        return self.head(x).logsumexp(-1).mean()


def ids(seed=0):
    return torch.randint(0, WORDS, (3, 17), generator=torch.Generator().manual_seed(seed))


def compare(model, plain):
    for (name, mine), param in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        found, wanted = zeroxide.safe_get_full_grad(mine), param[1].grad
        if wanted is None:
            assert found is None, name
        else:
            assert torch.equal(found, wanted), name


USES = ["once", "embedding twice", "tied by hand", "transposed by hand", "keyword", "head twice"]


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("uses", USES)
def test_gradients_are_plain_torchs(uses, tied, config):
    model = Model(uses, tied, padding=3)
    plain = copy.deepcopy(model)
    with started(model, config=config) as engine:
        assert isinstance(model.head.weight, large.LargeParameter)
        for seed in range(2):
            plain.zero_grad()
            engine.backward(engine(ids(seed)))
            plain(ids(seed)).backward()
            compare(model, plain)
            engine.zero_grad()


@pytest.mark.parametrize("uses", ["once", "embedding twice", "head twice"])
def test_micro_batches_add_up_as_in_plain_torch(uses, config):
    """Each is added to the sum so far as one gradient; a use at a time would round in another order."""
    model = Model(uses, tied=True)
    plain = copy.deepcopy(model)
    with started(model, config=config | {"gradient_accumulation_steps": 4}) as engine:
        for seed in range(4):
            engine.backward(engine(ids(seed)))
            (plain(ids(seed)) / 4).backward()
            compare(model, plain)
            if seed < 3:
                engine.step()


def test_a_gradient_that_nobody_asked_for_does_not_land(config):
    model = Model()
    plain = copy.deepcopy(model)
    with started(model, config=config) as engine:
        for uses in (model, plain):
            call = engine if uses is model else plain
            (found,) = torch.autograd.grad(call(ids()), uses.mix.weight)
            assert found.shape == (WIDTH, WIDTH)
            call(ids()).backward(inputs=[uses.mix.bias])
        compare(model, plain)
        engine.zero_grad()
        plain.zero_grad()
        engine.backward(engine(ids(1)))
        plain(ids(1)).backward()
        compare(model, plain)


@pytest.mark.parametrize("name", ["wte", "head"])
def test_the_gradient_that_is_asked_for_is_given(name, config):
    model = Model()
    plain = copy.deepcopy(model)
    with started(model, config=config) as engine:
        (found,) = torch.autograd.grad(engine(ids()), getattr(model, name).weight)
        (wanted,) = torch.autograd.grad(plain(ids()), getattr(plain, name).weight)
        assert found.layout is torch.strided
        assert torch.equal(found, wanted)
        assert all(zeroxide.safe_get_full_grad(param) is None for param in model.parameters())


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", ["wte", "head"])
def test_hooks_see_and_change_the_gradient(name, late, config):
    """Rows of old tokens are kept as they are by a mask, as scripts for new vocabularies do."""
    mask = (torch.arange(WORDS) >= WORDS // 2).float()[:, None]

    def put(model, seen):
        weight = getattr(model, name).weight
        weight.register_hook(lambda grad: seen.append(grad.clone()) or grad * mask)
        weight.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad.clone()))

    model, seen, wanted = Model(), [], []
    plain = copy.deepcopy(model)
    put(plain, wanted)
    if not late:
        put(model, seen)
    with started(model, config=config) as engine:
        if late:
            put(model, seen)
        engine.backward(engine(ids()))
        plain(ids()).backward()
        compare(model, plain)
        assert len(seen) == len(wanted) == 2
        assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))


def test_a_graph_from_before_a_step_is_refused_as_in_plain_torch(config):
    model = Model()
    with started(model, config=config) as engine:
        loss = engine(ids())
        engine.backward(loss, retain_graph=True)
        engine.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            engine.backward(loss)

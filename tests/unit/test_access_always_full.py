"""Parameters at stages 0 to 2 on one rank: visible at all times, and changed only where that counts."""

from __future__ import annotations

import copy

import pytest
import torch
from models import build, next_token_loss
from running import Mode, config_of, started
from torch import nn

import zeroxide
from zeroxide import zero
from zeroxide.errors import ModelError

PLACES = [(0, "none"), (1, "none"), (1, "cpu"), (2, "nvme")]


@pytest.fixture(params=PLACES, ids=lambda place: f"stage-{place[0]}-{place[1]}")
def settings(request, tmp_path):
    stage, optimizer = request.param

    def of(dtype="bf16"):
        config = config_of(Mode("none", optimizer), tmp_path, dtype)
        config["zero_optimization"] |= {"stage": stage}
        return config

    return of


def ids(seed=0):
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(seed))


def train(engine, seed=0):
    engine.backward(engine(ids(seed)))
    engine.step()


def check_values(engine):
    for name, param in engine.module.named_parameters():
        exact_value = zeroxide.safe_get_full_fp32_param(param)
        rounded = ((exact_value.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32)
        expected = exact_value if param.dtype is torch.float32 else rounded
        assert torch.equal(param.detach().float(), expected), name


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_parameters_show_the_weights_of_the_last_step(settings, dtype):
    """Catches: hiding them after a pass, and a step that returns while its update goes on."""
    model = build("gpt")
    count = sum(param.numel() for param in model.parameters())
    with started(model, config=settings(dtype)) as engine:
        assert sum(param.numel() for param in model.parameters()) == count
        check_values(engine)
        for step in range(3):
            before = model.h[0].up.weight.detach().clone()
            train(engine, step)
            assert not torch.equal(model.h[0].up.weight, before)
            check_values(engine)
        with torch.no_grad():
            engine.eval()(ids())
        check_values(engine)
        weight = model.h[0].up.weight
        assert weight.ds_persist
        assert weight.ds_status is zero.ZeroParamStatus.AVAILABLE
        average = copy.deepcopy(weight)
        assert torch.equal(average, weight)


def test_a_penalty_on_weights_trains_as_in_plain_torch(tmp_path):
    """A term of the loss that uses parameters outside of their modules."""
    plain, model = build("gpt"), build("gpt")
    model.load_state_dict(plain.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    config = config_of(Mode(), tmp_path, "fp32")
    config["zero_optimization"] |= {"stage": 1}

    def loss_of(call, module, seed):
        return call(ids(seed)) + 0.1 * sum(param.square().sum() for param in module.parameters())

    config["optimizer"]["params"]["weight_decay"] = 0.0
    with started(model, config=config) as engine:
        for step in range(3):
            loss, expected = loss_of(engine, model, step), loss_of(plain, plain, step)
            # Both sum in one order on one thread; only the update may differ, by an ulp a step or so.
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
            engine.backward(loss)
            engine.step()
            optimizer.zero_grad()
            expected.backward()
            optimizer.step()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_change_in_place_counts(settings, dtype):
    """Catches: a step that refuses it, and a master that knows nothing of it."""
    model = build("gpt")
    with started(model, config=settings(dtype)) as engine:
        train(engine)
        expected = model.h[0].up.weight.detach() * 0.5
        with torch.no_grad():
            model.h[0].up.weight.mul_(0.5)
        exact = zeroxide.safe_get_full_fp32_param(model.h[0].up.weight)
        # What rounding left of the master before is kept: half a bf16 ulp at most, 2^-8 of the weight.
        bound = expected.float().abs() * 2**-8 if dtype == "bf16" else 0.0
        assert torch.all((exact - expected.float()).abs() <= bound)
        check_values(engine)
        train(engine, 1)
        assert (engine.micro_steps, engine.global_steps) == (2, 2)
        check_values(engine)
        before = zeroxide.safe_get_full_fp32_param(model.h[0].up.weight)
        with zero.GatheredParameters(model.h[0].up.weight, modifier_rank=0):
            model.h[0].up.weight.data.mul_(0.5)
        after = zeroxide.safe_get_full_fp32_param(model.h[0].up.weight)
        assert (after - before / 2).abs().max() <= before.abs().max() * 2**-8
        train(engine, 2)
        check_values(engine)


def test_weights_are_not_loaded_behind_the_master_s_back(settings):
    model = build("gpt")
    with started(model, config=settings()) as engine:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ModelError, match=r"engine\.load_module_state_dict"):
            model.load_state_dict(state)
        doubled = {name: value * 2 for name, value in state.items()}
        engine.load_module_state_dict(doubled)
        assert all(torch.equal(value, doubled[name]) for name, value in model.state_dict().items())


class Renormalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(61, 8, max_norm=0.5)
        self.head = nn.Linear(8, 61)

    def forward(self, ids):
        return self.head(self.table(ids))


def test_embeddings_that_change_in_forward(tmp_path):
    """They train as in plain torch where their change counts, and are refused elsewhere."""
    torch.manual_seed(0)
    plain = Renormalized()
    config = config_of(Mode(), tmp_path, "fp32")
    for dtype in ("bf16", "fp32"):
        bad = config_of(Mode(), tmp_path, dtype)
        bad["zero_optimization"] |= {"stage": 3}
        with pytest.raises(ModelError, match=r"table has max_norm = 0\.5"):
            zeroxide.initialize(model=copy.deepcopy(plain), config=bad)
    config["zero_optimization"] |= {"stage": 0}
    model = copy.deepcopy(plain)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.01)
    with started(model, config=config) as engine:
        for step in range(3):
            loss, expected = next_token_loss(engine(ids(step)), ids(step)), next_token_loss(plain(ids(step)), ids(step))
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
            engine.backward(loss)
            engine.step()
            optimizer.zero_grad()
            expected.backward()
            optimizer.step()

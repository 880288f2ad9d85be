"""Weights that a script changes in place between steps: the update takes them over, in every format, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from models import build
from running import Mode, config_of, started

import zeroxide
from zeroxide.optim import AdamW

LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.999), 1e-8, 0.01

PLACES = [
    (0, Mode("none", "none", "split", 1)),
    (0, Mode("none", "none", "fp32", 2)),
    (1, Mode("none", "cpu", "split", 2)),
    (2, Mode("none", "nvme", "split", 2)),
    (2, Mode("none", "nvme", "fp32", 1)),
]


def zero_rows(param):
    param.data[0].zero_()


def clamp_data(param):
    param.data.clamp_(min=0)


def clamp_without_grad(param):
    with torch.no_grad():
        param.clamp_(min=0)


def masked(param):
    param.data[torch.arange(param.numel()).view(param.shape) % 3 == 0] = 0


def replaced(param):
    param.data.copy_(-param.data.flip(0))


def edges(param):
    """Values at the ends of the format, and the two zeroes."""
    flat = param.data.view(-1)
    flat[:4] = torch.tensor([0.0, -0.0, torch.finfo(param.dtype).tiny, -torch.finfo(param.dtype).tiny])


EDITS = [zero_rows, clamp_data, clamp_without_grad, masked, replaced, edges]


def half_up(values: torch.Tensor) -> torch.Tensor:
    """fp32 rounded to bf16 to nearest, ties away from zero, by arithmetic in double precision; finite values."""
    exact = values.double()
    _, exponent = torch.frexp(exact)
    # 8 significant bits, and no spacing below that of the subnormals, 2^-133.
    spacing = torch.ldexp(torch.ones_like(exact), (exponent - 8).clamp(min=-133))
    return torch.copysign((exact.abs() / spacing + 0.5).floor() * spacing, exact)


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.bfloat16:
        return half_up(values)
    return values.to(dtype).double()


class Reference:
    """AdamW in double precision on the exact weights."""

    def __init__(self):
        self.step = 0
        self.mean = self.square = 0.0

    def update(self, weight, gradient):
        self.step += 1
        self.mean = BETAS[0] * self.mean + (1 - BETAS[0]) * gradient
        self.square = BETAS[1] * self.square + (1 - BETAS[1]) * gradient**2
        correction = [1 - beta**self.step for beta in BETAS]
        root = (self.square / correction[1]).sqrt() + EPS
        return weight * (1 - LR * DECAY) - LR * (self.mean / correction[0]) / root


def check_near(found, expected):
    """Both sides start from the same exact weight. One step of the kernel is within 2 ulp (2^-22 of it) of the formula
    on its own fp32 moments, and those drift from the double ones by an ulp a step, which moves the update, at most
    some ten times the rate, by 2^-23 of it a step: within ten steps, 10 LR (4 + 10) 2^-23.
    """
    bound = expected.abs() * 2.0**-22 + 10 * LR * 14 * 2.0**-23
    assert torch.all((found.double() - expected).abs() <= bound)


def settings(mode, stage, path, dtype):
    config = config_of(mode, path, dtype)
    config["zero_optimization"] |= {"stage": stage}
    config["gradient_clipping"] = 0.0
    config["optimizer"] = {
        "type": "AdamW",
        "params": {"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": DECAY},
    }
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 1.0}
    return config


def ids(seed):
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edit_of_a_live_weight_becomes_the_master(edit, dtype, tmp_path):
    """Catches: a pair of halves that joins to NaN, a master that overwrites the edit, and formats that differ."""
    outcomes = []
    places = PLACES if dtype == "bf16" else [(stage, mode) for stage, mode in PLACES if mode.format == "fp32"]
    for stage, mode in places:
        model = build("gpt")
        chosen = [model.h[0].up.weight, model.h[1].down.weight, model.wte.weight]
        references = [Reference() for _ in chosen]
        with started(model, config=settings(mode, stage, tmp_path, dtype)) as engine:
            seen = []
            for step in range(4):
                for param in chosen if step else ():
                    before = param.detach().clone()
                    edit(param)
                    assert not torch.equal(param.detach(), before)
                exact = [zeroxide.safe_get_full_fp32_param(param) for param in chosen]
                for param, value in zip(chosen, exact, strict=True):
                    assert torch.equal(rounded(value, param.dtype), param.detach().double())
                loss = engine(ids(step))
                assert math.isfinite(loss.item())
                engine.backward(loss)
                gradients = [zeroxide.safe_get_full_grad(param) for param in chosen]
                engine.step()
                assert engine.was_step_applied()
                for param, reference, value, gradient in zip(chosen, references, exact, gradients, strict=True):
                    expected = reference.update(value.double(), gradient.double())
                    check_near(zeroxide.safe_get_full_fp32_param(param), expected)
                seen += [loss.item(), *(zeroxide.safe_get_full_fp32_param(param) for param in model.parameters())]
            seen += [param.detach().clone() for param in model.parameters()]
        outcomes.append(seen)
    for outcome in outcomes[1:]:
        for found, expected in zip(outcome, outcomes[0], strict=True):
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_the_plain_optimizer_takes_edits_over(edit, dtype, tmp_path):
    outcomes = []
    for offload, format in [("none", "split"), ("none", "fp32"), (f"nvme:{tmp_path}", "split"), ("cpu", "fp32")]:
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.randn(50, 20, generator=generator).to(dtype))
        optimizer = AdamW([param], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, offload=offload, format=format)
        reference = Reference()
        for _ in range(4):
            edit(param)
            exact = optimizer.state_dict()["state"][0]["master"] if dtype is torch.bfloat16 else param.detach().clone()
            assert torch.equal(rounded(exact, dtype), param.detach().double())
            param.grad = torch.randn(50, 20, generator=generator).to(dtype)
            expected = reference.update(exact.double(), param.grad.double())
            optimizer.step()
            after = optimizer.state_dict()["state"][0]["master"] if dtype is torch.bfloat16 else param.detach()
            check_near(after, expected)
        outcomes.append((param.detach().clone(), after.clone()))
        optimizer.close()
    assert all(torch.equal(a, b) for outcome in outcomes for a, b in zip(outcome, outcomes[0], strict=True))


@pytest.mark.parametrize("format", ["split", "fp32"])
def test_weights_loaded_after_the_optimizer_was_made_are_seen(format):
    """A bf16 weight is taken with at most half its last bit of what stood there before."""
    torch.manual_seed(0)
    first, second = torch.nn.Linear(16, 16).bfloat16(), torch.nn.Linear(16, 16).bfloat16()
    optimizer = AdamW(first.parameters(), lr=0.0, weight_decay=0.0, format=format)
    first.load_state_dict(second.state_dict())
    first(torch.ones(1, 16).bfloat16()).sum().backward()
    optimizer.step()
    for param, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(param, other)
    optimizer.close()

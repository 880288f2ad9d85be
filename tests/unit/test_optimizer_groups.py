"""Hyperparameters that scripts drive: tensors filled in place, schedules, wrong values, named parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from models import build
from running import Mode, config_of, started
from torch.optim import lr_scheduler

import zeroxide
from zeroxide.errors import ConfigError, ModelError
from zeroxide.optim import AdamW


def ids(seed):
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(seed))


def settings(path, stage=0):
    config = config_of(Mode(), path, "fp32")
    config["zero_optimization"] |= {"stage": stage}
    del config["optimizer"]
    return config


def follow(engine, plain, theirs, steps, after=lambda step: None):
    """Trains both sides on one gradient and compares the weights.

    An fp32 update differs by the roundings of both sides, 10 ulp of it and an ulp of the weight a step: with rates of
    at most 0.1, a handful of steps and weights below 2, 1e-5 bounds it many times over.
    """
    for step in range(steps):
        engine.backward(engine(ids(step)))
        for param, mine in zip(plain.parameters(), engine.module.parameters(), strict=True):
            param.grad = zeroxide.safe_get_full_grad(mine)
        engine.step()
        theirs.step()
        after(step)
        for param, mine in zip(plain.parameters(), engine.module.parameters(), strict=True):
            torch.testing.assert_close(zeroxide.safe_get_full_fp32_param(mine), param.detach(), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_a_rate_that_is_a_tensor_is_read_at_every_step(kind, tmp_path):
    model = build("gpt")
    plain = copy.deepcopy(model)
    rate, other = torch.tensor(1e-2), torch.tensor(1e-2)
    options = {"betas": (0.8, 0.99), "weight_decay": 0.1, "foreach": False}
    mine = kind(model.parameters(), lr=rate, **options)
    theirs = kind(plain.parameters(), lr=other, **options)

    def drive(step):
        for tensor in (rate, other):
            tensor.fill_([0.1, 0.0, 3e-3][step])
        assert engine.get_lr() == [pytest.approx(rate.item())]

    with started(model, config=settings(tmp_path), optimizer=mine) as engine:
        assert engine.optimizer.param_groups[0]["lr"] is rate
        follow(engine, plain, theirs, 3, drive)
        engine.save_checkpoint(tmp_path / "saved", tag="t")
        rate.fill_(0.7)
        engine.load_checkpoint(tmp_path / "saved", tag="t")
        assert engine.optimizer.param_groups[0]["lr"] is rate
        assert rate.item() == pytest.approx(3e-3)


def test_tensors_in_the_plain_optimizer():
    param, rate = torch.nn.Parameter(torch.ones(8)), torch.tensor(0.5)
    beta = torch.tensor(0.9)
    optimizer = AdamW([param], lr=rate, betas=(beta, 0.999), weight_decay=0.0)
    for expected, value in ((0.5, 0.0), (0.5, 0.25), (0.25, 0.0)):
        param.grad = torch.ones(8)
        optimizer.step()
        # A gradient that stays the same moves a weight by the rate.
        assert torch.allclose(param, torch.full((8,), expected))
        rate.fill_(value)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["lr"] is rate
    optimizer.close()


SCHEDULES = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-1, total_steps=8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.StepLR(o, 1, 0.5), lr_scheduler.ConstantLR(o, 0.5, 2)]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
}


@pytest.mark.parametrize("made_from", ["the engine's", "an own", "a tensor's"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_act_on_rates_and_betas(name, made_from, tmp_path):
    """Beside the same schedule over torch's optimizer. Catches: betas and rates that are read once."""
    model = build("gpt")
    plain = copy.deepcopy(model)
    rate = 1e-2 if made_from != "a tensor's" else torch.tensor(1e-2, dtype=torch.float64)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = SCHEDULES[name](theirs)
    own = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, foreach=False)
    given = SCHEDULES[name] if made_from == "the engine's" else SCHEDULES[name](own)
    with started(model, config=settings(tmp_path), optimizer=own, lr_scheduler=given) as engine:

        def check(step):
            schedule.step()
            assert engine.get_lr() == pytest.approx([group["lr"] for group in theirs.param_groups], rel=1e-6)
            assert engine.get_mom() == [pytest.approx(group["betas"]) for group in theirs.param_groups]

        follow(engine, plain, theirs, 5, check)


def test_a_schedule_that_needs_a_metric(tmp_path):
    """It gets one through lr_kwargs, and a step without is refused before anything has happened."""
    model = build("gpt")
    config = settings(tmp_path) | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}
    with started(
        model, config=config, lr_scheduler=lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0)
    ) as engine:
        engine.backward(engine(ids(0)))
        weight = model.wte.weight.detach().clone()
        for wrong in (None, {}, {"value": 1.0}):
            with pytest.raises(ConfigError, match=r"ReduceLROnPlateau .*lr_kwargs=\{\"metrics\": loss\}"):
                engine.step(lr_kwargs=wrong)
        assert torch.equal(model.wte.weight, weight)
        assert (engine.micro_steps, engine.global_steps) == (0, 0)
        engine.step(lr_kwargs={"metrics": 1.0})
        assert engine.was_step_applied()
        assert engine.get_lr() == [1e-2]
        engine.backward(engine(ids(1)))
        engine.step(lr_kwargs={"metrics": 2.0})
        assert engine.get_lr() == [5e-3]
        engine.save_checkpoint(tmp_path / "saved", tag="t")
        engine.load_checkpoint(tmp_path / "saved", tag="t")
        assert engine.lr_scheduler.best == 1.0


WRONG = [
    ("lr", float("inf")),
    ("lr", float("nan")),
    ("lr", -1e-3),
    ("lr", torch.tensor(float("nan"))),
    ("betas", (0.9, 1.0)),
    ("betas", (-0.1, 0.9)),
    ("betas", (0.9,)),
    ("eps", -1e-8),
    ("eps", 1e-38),
    ("eps", 1e-45),
    ("eps", float("nan")),
    ("weight_decay", -0.1),
    ("weight_decay", "much"),
    ("lr", None),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_hyperparameters_outside_their_range_are_named(name, value, tmp_path):
    """When they are given, and when they are set between two steps, before the step."""
    said = {"betas": "beta|number", "lr": "lr|number"}.get(name, f"{name}|number")
    params = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(ConfigError, match=said):
        AdamW(params, **{"lr": 1e-3, name: value})
    optimizer = AdamW(params)
    params[0].grad = torch.ones(3)
    optimizer.param_groups[0][name] = value
    with pytest.raises(ConfigError, match=said):
        optimizer.step()
    assert torch.equal(params[0], torch.ones(3))
    optimizer.close()
    model = build("gpt")
    config = settings(tmp_path) | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}
    with pytest.raises(ConfigError, match=said):
        zeroxide.initialize(
            model=model, config=config, model_parameters=[{"params": list(model.parameters()), name: value}]
        )
    assert model.wte.weight.numel()
    with started(model, config=config) as engine:
        engine.backward(engine(ids(0)))
        before = engine.optimizer.param_groups[0][name]
        engine.optimizer.param_groups[0][name] = value
        with pytest.raises(ConfigError, match=said):
            engine.step()
        assert engine.micro_steps == 0
        engine.optimizer.param_groups[0][name] = before
        engine.step()
        assert engine.was_step_applied()


@pytest.mark.parametrize("eps", [1e-30, 1e-16, 1e-3])
def test_a_small_eps_is_torchs(eps):
    """Gradients from zero to one; torch computes in double. A weight differs by 2 ulp of it and of the update."""
    gradient = torch.tensor([0.0, 1e-12, 1e-6, 1e-3, 1.0, -1.0])
    mine, theirs = torch.nn.Parameter(torch.ones(6)), torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
    first, second = AdamW([mine], lr=1e-2, eps=eps), torch.optim.AdamW([theirs], lr=1e-2, eps=eps)
    for _ in range(3):
        mine.grad, theirs.grad = gradient.clone(), gradient.double()
        first.step()
        second.step()
    assert (mine.double() - theirs).abs().max() <= 3 * 4 * 2.0**-24
    first.close()


def test_parameters_may_come_with_names(tmp_path):
    model = build("gpt")
    config = settings(tmp_path) | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}
    pairs = list(model.named_parameters())
    decayed = [pair for pair in pairs if pair[1].ndim > 1]
    others = [pair for pair in pairs if pair[1].ndim <= 1]
    model.h[0].up.bias.requires_grad_(False)
    for given in (
        model.named_parameters(),
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        [{"params": iter(decayed)}, {"params": others, "lr": 0.0}],
    ):
        model = copy.deepcopy(model)
        renamed = dict(model.named_parameters())
        again = [
            {**each, "params": [(name, renamed[name]) for name, _ in each["params"]]}
            if isinstance(each, dict)
            else (each[0], renamed[each[0]])
            for each in given
        ]
        with started(model, config=config, model_parameters=again) as engine:
            names = [name for group in engine.optimizer.param_groups for name in group["param_names"]]
            assert len(names) == len(pairs) - 1
            engine.backward(engine(ids(0)))
            engine.step()
            assert engine.was_step_applied()
            bad = {**copy.deepcopy(engine.optimizer.state_dict())}
            bad["state"][0]["exp_avg"] = torch.ones(1)
            with pytest.raises(ConfigError, match=names[0].replace(".", r"\.")):
                engine.optimizer.load_state_dict(bad)


def test_parameters_that_are_none_are_named(tmp_path):
    model = build("gpt")
    config = settings(tmp_path) | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}
    for given, line in [
        (dict(model.named_parameters()), "got a dict"),
        (model.wte.weight, "got a Parameter"),
        (["wte.weight"], "item 0 is a str"),
        ([{"lr": 1.0}], "expected a dict with params"),
        ([{"params": [3]}], r"model_parameters\[0\]: item 0 is a int"),
    ]:
        with pytest.raises(ConfigError, match=line):
            zeroxide.initialize(model=model, config=config, model_parameters=given)
    with pytest.raises(ModelError, match="does not have"):
        zeroxide.initialize(model=model, config=config, model_parameters=[torch.nn.Parameter(torch.ones(1))])
    for option in ("amsgrad", "maximize", "differentiable"):
        own = torch.optim.AdamW(model.parameters(), **{option: True})
        with pytest.raises(ConfigError, match=f"{option}=True"):
            zeroxide.initialize(model=model, config=settings(tmp_path), optimizer=own)
    own = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=False, foreach=True, fused=False)
    with started(model, config=settings(tmp_path), optimizer=own) as engine:
        engine.backward(engine(ids(0)))
        engine.step()
        assert engine.was_step_applied()

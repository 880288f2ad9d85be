"""What a step does besides moving weights: accumulation, clipping, skipping, schedules, optimizers, groups."""

from __future__ import annotations

import math

import pytest
import torch
from models import Gpt, batches, build, loss_of
from running import Mode, assert_released, config_of, started, state_of, weights_of
from torch import nn

from zeroxide.errors import ConfigError, ModelError

MODES = [Mode(), Mode("nvme", "nvme", "fp32", 2, "auto", 8192, 1 << 20)]


def ids_of(mode):
    return str(mode)


def spied_gradients(engine):
    """The gradients as the engine receives them, summed, in float64."""
    sums: dict[str, torch.Tensor] = {}

    def hook(grad, name):
        sums[name] = sums[name] + grad.double() if name in sums else grad.double()

    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            param.register_hook(lambda grad, name=name: hook(grad, name))
    return sums


@pytest.mark.parametrize("mode", MODES, ids=ids_of)
def test_accumulation_equals_the_big_batch(mode, tmp_path):
    """Four micro-batches of 2 rows or one batch of 8: the same mean of the same numbers, summed in another order.

    A gradient element of a tiny model is a sum of n <= rows x length x width products, each order of which is within
    n u sum|terms| of the exact sum; the sums of absolute terms are bounded by the norm of the gradients of single
    rows, so 1e-5 of the largest element, about 100 u, has room. Adam's first update is lr g / (|g| + eps) and forgets
    the size of g, so gradients are compared and not weights.
    """
    (big,) = batches("gpt", 1, rows=8)
    small = [{"input_ids": big["input_ids"][at : at + 2]} for at in range(0, 8, 2)]
    found = []
    for steps, feed in ((1, [big]), (4, small)):
        config = config_of(mode, tmp_path, "fp32", gradient_accumulation_steps=steps)
        with started(build("gpt"), config=config) as engine:
            for batch in feed:
                assert engine.global_steps == 0
                engine.backward(engine(**batch))
                engine.step()
            assert engine.global_steps == 1
            # After the first step exp_avg = (1 - beta1) g.
            grads = {name: parts[0] / (1 - 0.9) for name, parts in state_of(engine, ["exp_avg"]).items()}
            found.append((grads, float(engine.get_global_grad_norm())))
    (one, norm), (four, other_norm) = found
    assert norm == pytest.approx(other_norm, rel=1e-5)
    for name, grad in one.items():
        assert (four[name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name


def test_the_boundary_can_be_told(tmp_path):
    feed = batches("gpt", 6)
    with started(build("gpt"), config=config_of(MODES[0], tmp_path, "fp32", gradient_accumulation_steps=2)) as engine:
        before = weights_of(engine)
        for number, batch in enumerate(feed):
            boundary = number == 4
            engine.set_gradient_accumulation_boundary(boundary)
            assert engine.is_gradient_accumulation_boundary() is boundary
            engine.backward(engine(**batch))
            engine.step()
            assert engine.was_step_applied() is boundary
            assert engine.global_steps == int(number >= 4)
            if number == 3:
                assert all(torch.equal(value, before[name]) for name, value in weights_of(engine).items())
        engine.set_gradient_accumulation_boundary(None)
        assert engine.is_gradient_accumulation_boundary() is False


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("mode", MODES, ids=ids_of)
def test_the_norm_is_that_of_the_gradients_and_clips(mode, dtype, tmp_path):
    """The norm is summed in float64 from chunks of fp32 lanes: n u with n at most 4096 / 16 additions a lane."""
    (batch,) = batches("gpt", 1)
    moments = []
    for clip in (0.0, 0.25):
        with started(build("gpt"), config=config_of(mode, tmp_path, dtype, gradient_clipping=clip)) as engine:
            grads = spied_gradients(engine)
            engine.backward(engine(**batch))
            engine.step()
            norm = math.sqrt(sum(grad.square().sum().item() for grad in grads.values()))
            assert engine.get_global_grad_norm() == pytest.approx(norm, rel=256 * 2.0**-24)
            assert norm > 0.5, "so that clipping at 0.25 does something"
            moments.append({name: parts[0] for name, parts in state_of(engine, ["exp_avg"]).items()})
    for name, plain in moments[0].items():
        assert torch.allclose(moments[1][name], plain * (0.25 / (norm + 1e-6)), rtol=1e-5, atol=1e-12), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("mode", MODES, ids=ids_of)
def test_a_gradient_that_is_not_finite_skips_the_step(mode, bad, tmp_path):
    first, second = batches("gpt", 2)
    schedule = {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-4, "warmup_max_lr": 1e-3, "warmup_num_steps": 10}}
    with started(build("gpt"), config=config_of(mode, tmp_path, gradient_clipping=1.0, scheduler=schedule)) as engine:
        engine.backward(engine(**first))
        engine.step()
        weights, state, rate = weights_of(engine), state_of(engine), engine.get_lr()
        engine.backward(engine(**second) * bad)
        engine.step()
        assert engine.skipped_steps == 1
        assert not engine.was_step_applied()
        assert engine.optimizer.overflow
        assert engine.get_global_grad_norm() == math.inf
        assert engine.get_lr() == rate
        assert all(torch.equal(value, weights[name]) for name, value in weights_of(engine).items())
        for name, parts in state_of(engine).items():
            assert all(torch.equal(a, b) for a, b in zip(parts, state[name], strict=True)), name
        engine.backward(engine(**second))
        engine.step()
        assert engine.was_step_applied()
        assert engine.skipped_steps == 1
        assert math.isfinite(engine.get_global_grad_norm())
        assert any(not torch.equal(value, weights[name]) for name, value in weights_of(engine).items())


def test_zero_grad_forgets_what_has_landed(tmp_path):
    first, second = batches("gpt", 2)
    norms = []
    for spoil in (False, True):
        with started(build("gpt"), config=config_of(MODES[0], tmp_path, "fp32")) as engine:
            if spoil:
                engine.backward(engine(**first))
                engine.zero_grad()
            engine.backward(engine(**second))
            engine.step()
            norms.append(float(engine.get_global_grad_norm()))
    assert norms[0] == norms[1]


@pytest.mark.parametrize("mode", MODES, ids=ids_of)
def test_a_failed_backward_can_be_repeated(mode, tmp_path):
    """Also one that the engine did not start itself."""

    class Fails(torch.autograd.Function):
        fail = False

        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, grad):
            if Fails.fail:
                raise RuntimeError("as asked")
            return grad

    model = build("gpt")
    model.h[1].register_forward_hook(lambda module, args, output: Fails.apply(output))
    (batch,) = batches("gpt", 1)
    with started(model, config=config_of(mode, tmp_path, "fp32")) as engine:
        loss = engine(**batch)
        Fails.fail = True
        with pytest.raises(RuntimeError, match="as asked"):
            loss.backward()
        Fails.fail = False
        engine.zero_grad()
        again = engine(**batch)
        again.backward()
        engine.step()
        assert torch.equal(loss, again)
        assert engine.was_step_applied()
        assert_released(engine)


# Schedules and optimizers -----------------------------------------------------------------------------------------


def rates_of(engine, count=6):
    feed, rates = batches("gpt", count), []
    for batch in feed:
        rates.append(engine.get_lr()[0])
        engine.backward(engine(**batch))
        engine.step()
    return rates


def plain_rates(make, count=6, **options):
    param = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([param], lr=1e-3, **options)
    scheduler = make(optimizer)
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        param.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
    return rates


def sequence(optimizer):
    from torch.optim import lr_scheduler

    parts = [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(optimizer, 10)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


TORCH_SCHEDULES = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=20),
    "sequence": sequence,
}


@pytest.mark.parametrize("name", TORCH_SCHEDULES)
@pytest.mark.parametrize("way", ["callable", "over a torch optimizer", "over the returned optimizer"])
def test_torch_schedules_drive_the_rate(name, way, tmp_path):
    make, model = TORCH_SCHEDULES[name], build("gpt")
    arguments = {"config": config_of(MODES[0], tmp_path, "fp32")}
    if way == "callable":
        arguments["lr_scheduler"] = make
    elif way == "over a torch optimizer":
        del arguments["config"]["optimizer"]
        arguments["optimizer"] = torch.optim.AdamW(model.parameters(), lr=1e-3)
        arguments["lr_scheduler"] = make(arguments["optimizer"])
    with started(model, **arguments) as engine:
        if way == "over the returned optimizer":
            engine.lr_scheduler = make(engine.optimizer)
        assert rates_of(engine) == pytest.approx(plain_rates(make), rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("WarmupLR", {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-2, "warmup_num_steps": 4, "warmup_type": "linear"}),
        ("WarmupDecayLR", {"warmup_max_lr": 1e-2, "warmup_num_steps": 2, "total_num_steps": 6}),
        ("WarmupCosineLR", {"warmup_num_steps": 2, "total_num_steps": 6}),
    ],
)
def test_configured_schedules_drive_the_rate(kind, params, tmp_path):
    from zeroxide.optim import schedules

    with started(
        build("gpt"), config=config_of(MODES[0], tmp_path, "fp32", scheduler={"type": kind, "params": params})
    ) as engine:
        rates = rates_of(engine)
    assert rates == pytest.approx(plain_rates(lambda o: getattr(schedules, kind)(o, **params)), rel=1e-12)
    assert len(set(rates)) >= 4


def trained(model, mode, tmp_path, **arguments):
    config = config_of(mode, tmp_path, "fp32")
    if "optimizer" in arguments:
        del config["optimizer"]
    with started(model, config=config, **arguments) as engine:
        for batch in batches("gpt", 3):
            engine.backward(engine(**batch))
            engine.step()
        return weights_of(engine)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("way", ["object", "callable"])
def test_a_torch_optimizer_gives_its_hyperparameters(kind, way, tmp_path):
    options = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
    plain = build("gpt")
    reference = kind(plain.parameters(), **options)
    for batch in batches("gpt", 3):
        plain(**batch).backward()
        reference.step()
        reference.zero_grad()
    model = build("gpt")
    given = kind(model.parameters(), **options) if way == "object" else lambda params: kind(params, **options)
    found = trained(model, MODES[0], tmp_path, optimizer=given)
    # Three steps, each 3e-3 at most; the bound on one is in numerics/test_against_torch.py.
    for name, param in plain.named_parameters():
        assert torch.allclose(found[name], param, rtol=1e-5, atol=1e-6), name


def test_groups_have_their_own_hyperparameters(tmp_path):
    model = build("gpt")
    held, free = [model.h[0].up.weight], [p for p in model.parameters() if p is not model.h[0].up.weight]
    before = model.h[0].up.weight.detach().clone()
    groups = [{"params": held, "lr": 0.0, "weight_decay": 0.5}, {"params": iter(free)}]
    found = trained(model, MODES[1], tmp_path, model_parameters=groups)
    assert torch.equal(found["h.0.up.weight"], before)
    assert not torch.equal(found["h.1.up.weight"], build("gpt").h[1].up.weight)


def test_rates_changed_by_hand_take_effect(tmp_path):
    with started(build("gpt"), config=config_of(MODES[0], tmp_path, "fp32")) as engine:
        before = weights_of(engine)
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0
        engine.backward(engine(**batches("gpt", 1)[0]))
        engine.step()
        assert all(torch.equal(value, before[name]) for name, value in weights_of(engine).items())


# What is refused --------------------------------------------------------------------------------------------------


def test_models_that_cannot_be_trained_are_refused(tmp_path):
    config = config_of(MODES[1], tmp_path)

    def refused(model, error, match, **arguments):
        with pytest.raises(error, match=match) as caught, started(model, config=config, **arguments):
            pass
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    refused(nn.ReLU(), ModelError, "no parameters")
    refused(build("gpt").requires_grad_(False), ModelError, "frozen")
    whole = build("gpt")
    whole.register_parameter("count", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    refused(whole, ModelError, "count is trained and has dtype complex64")
    split = build("gpt")
    split.norm = nn.LayerNorm(48, device="meta")
    refused(split, ModelError, "meta")
    with torch.device("meta"):
        empty = Gpt()
    refused(empty, ModelError, "weights=")
    some = build("gpt")
    refused(some, ConfigError, "in no optimizer group", model_parameters=[some.wte.weight])
    twice = build("gpt")
    doubled = [{"params": list(twice.parameters())}, {"params": [twice.wte.weight]}]
    refused(twice, ConfigError, "two optimizer groups", model_parameters=doubled)
    refused(build("gpt"), ModelError, "does not have", model_parameters=[*build("gpt").parameters()])
    with pytest.raises(ModelError, match="needs a model"), started(None):
        pass


def test_a_loss_that_is_no_scalar_is_refused(tmp_path):
    with started(build("gpt"), config=config_of(MODES[0], tmp_path)) as engine:
        with pytest.raises(ValueError, match=r"scalar loss, got shape \(2, 3\)"):
            engine.backward(torch.ones(2, 3, requires_grad=True))
        loss = loss_of(engine(**batches("gpt", 1)[0]))
        engine.backward(loss)
        engine.step()
        assert engine.was_step_applied()


def test_other_optimizers_are_refused(tmp_path):
    config = config_of(MODES[0], tmp_path)
    del config["optimizer"]
    for optimizer, match in [
        (lambda p: torch.optim.RMSprop(p, lr=1.0), "RMSprop cannot be offloaded"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad"),
    ]:
        with pytest.raises(ConfigError, match=match), started(build("gpt"), config=config, optimizer=optimizer):
            pass

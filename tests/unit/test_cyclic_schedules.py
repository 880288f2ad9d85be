"""The range test and the one-cycle schedule against DeepSpeed's own values, and as an engine runs them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from deepspeed_schedules import groups
from running import started
from torch import nn

from zeroxide.errors import ConfigError
from zeroxide.optim.schedules import SCHEDULES, LRRangeTest, OneCycle

CASES = json.loads(Path(__file__).with_name("deepspeed_schedules.json").read_text())


def optimizer(kind=torch.optim.AdamW):
    params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    return kind([{"params": [params[0]]}, {"params": [params[1]], "lr": 2e-3}], lr=1e-3)


def run(schedule, steps):
    """What optimizer steps see."""
    seen = []
    for _ in range(steps):
        seen.append(groups(schedule.optimizer))
        schedule.optimizer.step()
        schedule.step()
    return seen


def same(found, expected):
    """Within 4 roundings of fp64, as both are a few operations on the same numbers."""
    return all(
        math.isclose(a, b, rel_tol=4 * 2**-53, abs_tol=2**-53)
        for one, other in zip(found, expected, strict=True)
        for ours, theirs in zip(one, other, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("case", CASES, ids=[f"{each['name']}-{at}" for at, each in enumerate(CASES)])
def test_every_step_has_deepspeeds_rate_and_momentum(case):
    """Catches: a stair lost to rounding, the high momentum at the first step, a decay that begins a step late, the
    second half with the first half's stairs."""
    schedule = SCHEDULES[case["name"]](optimizer(), **case["arguments"])
    assert same(run(schedule, len(case["seen"])), case["seen"])


@pytest.mark.parametrize("stop", [0, 1, 6, 11])
@pytest.mark.parametrize("case", CASES, ids=[f"{each['name']}-{at}" for at, each in enumerate(CASES)])
def test_a_resumed_schedule_goes_on_with_the_same_bits(case, stop):
    """From zeroxide's saved state, and from DeepSpeed's. Catches: momenta that are not put back."""
    kind, arguments = SCHEDULES[case["name"]], case["arguments"]
    whole = run(kind(optimizer(), **arguments), 24)
    first = kind(optimizer(), **arguments)
    assert run(first, stop) == whole[:stop]
    for state in (first.state_dict(), {"last_batch_iteration": stop - 1}):
        resumed = kind(optimizer(), **arguments)
        resumed.load_state_dict(state)
        assert run(resumed, 24 - stop) == whole[stop:]


def test_an_engine_steps_with_the_rates_and_momenta(tmp_path):
    """Against torch's AdamW with DeepSpeed's numbers put into its groups. The bound is 64 roundings of fp32 of each
    weight, for ten steps of six operations. Catches: betas that the update does not read, or reads once."""
    case = CASES[4]
    torch.manual_seed(0)
    model, plain = nn.Linear(8, 8), nn.Linear(8, 8)
    plain.load_state_dict(model.state_dict())
    oracle = torch.optim.AdamW(plain.parameters(), weight_decay=0.01)
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.01}},
        "scheduler": {
            "type": case["name"],
            "params": case["arguments"] | {"cycle_min_lr": 0.01, "cycle_max_lr": 0.05},
        },
        "gradient_clipping": 0,
    }
    schedule = OneCycle(optimizer(), **config["scheduler"]["params"])
    expected = run(schedule, 10)
    x = torch.randn(4, 8)
    with started(model, config=config) as engine:
        for rate, *betas in (each[0] for each in expected):
            oracle.param_groups[0]["lr"], oracle.param_groups[0]["betas"] = rate, tuple(betas)
            oracle.zero_grad()
            plain(x).square().mean().backward()
            oracle.step()
            engine.backward(engine(x).square().mean())
            engine.step()
        assert engine.get_mom()[0] == pytest.approx(schedule.get_mom()[0])
        found = engine.module_state_dict()
    for name, value in plain.state_dict().items():
        assert torch.allclose(found[name], value, rtol=64 * 2**-24, atol=64 * 2**-24), name


def test_a_momentum_that_has_grown_past_its_range_is_refused_by_name():
    """As with DeepSpeed the decay has no end; there the update goes wrong without a word."""
    params = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_first_step_size": 1, "decay_step_size": 1}
    scheduler = {"type": "OneCycle", "params": params | {"decay_mom_rate": 0.2}}
    with started(nn.Linear(2, 2), config={"optimizer": {"type": "AdamW"}, "scheduler": scheduler}) as engine:
        for _ in range(3):
            engine.backward(engine(torch.ones(1, 2)).sum())
            engine.step()
        engine.backward(engine(torch.ones(1, 2)).sum())
        with pytest.raises(ConfigError, match="beta"):
            engine.step()


def test_another_second_beta_is_said(caplog):
    OneCycle(optimizer(), 0.1, 0.2)
    assert "the second beta is 0.99, not 0.999, as with DeepSpeed" in caplog.text
    caplog.clear()
    OneCycle(optimizer(), 0.1, 0.2, cycle_momentum=False)
    OneCycle(torch.optim.AdamW([nn.Parameter(torch.zeros(1))], betas=(0.9, 0.99)), 0.1, 0.2)
    assert caplog.text == ""


def test_an_optimizer_without_betas_keeps_its_momentum(caplog):
    schedule = OneCycle(optimizer(torch.optim.SGD), 0.1, 0.2, cycle_first_step_size=2)
    assert "SGD has no betas: cycle_momentum has no effect" in caplog.text
    assert schedule.get_mom() is None
    schedule.optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(0.15)] * 2
    assert all("betas" not in group for group in schedule.optimizer.param_groups)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda o: OneCycle(o, 0.1, 0.2, cycle_first_step_size=0), "cycle_first_step_size: expected a number above 0"),
        (lambda o: OneCycle(o, 0.1, 0.2, cycle_second_step_size=-1), "cycle_second_step_size: expected a number at"),
        (lambda o: OneCycle(o, [0.1], 0.2), "cycle_min_lr: expected one rate for each of 2 parameter groups, got 1"),
        (lambda o: OneCycle(o, 0.1, 0.2, cycle_first_stair_count=1.5), "cycle_first_stair_count: expected an integer"),
        (lambda o: LRRangeTest(o, lr_range_test_step_size=0), "lr_range_test_step_size: expected an integer of at"),
    ],
)
def test_wrong_parameters_are_named(make, line):
    with pytest.raises(ValueError, match=line):
        make(optimizer())


@pytest.mark.parametrize(
    ("params", "line"),
    [
        ({"cycle_max_lr": 0.1}, "scheduler.params.cycle_min_lr"),
        (
            {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_max_mom": 1},
            "a number of at least 0 and below 1, or a list",
        ),
        ({"cycle_min_lr": 0.3, "cycle_max_lr": 0.2}, "cycle_min_lr = 0.3 is above scheduler.params.cycle_max_lr = 0.2"),
        ({"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_first_step_size": 0}, "a finite number above 0"),
    ],
)
def test_a_wrong_config_is_refused(params, line):
    with pytest.raises(ConfigError, match=line), started(nn.Linear(2, 2), config={
        "optimizer": {"type": "AdamW"}, "scheduler": {"type": "OneCycle", "params": params}
    }):  # fmt: skip
        pass

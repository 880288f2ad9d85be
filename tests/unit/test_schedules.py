"""The schedules against the closed formulas, and as torch schedulers."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroxide.optim.schedules import WarmupCosineLR, WarmupDecayLR, WarmupLR

WARMUPS = {each.__name__: each for each in (WarmupLR, WarmupDecayLR, WarmupCosineLR)}


def optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def run(schedule, steps: int) -> list[list[float]]:
    """The rates that optimizer steps 0, 1, ... see."""
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in schedule.optimizer.param_groups])
        assert schedule.get_last_lr() == seen[-1]
        schedule.optimizer.step()
        schedule.step()
    return seen


def oracle(
    kind: str, step: int, *, base: float, low: float, high: float, n: int, log: bool, end: int, start: float, c: float
) -> float:
    """The rate at an optimizer step, written from the published formulas and sharing nothing with the code."""
    n, i = max(2, n), step - 1
    if i < 0:
        return 0.0 if kind == "WarmupCosineLR" else low
    rise = (math.log1p(i) / math.log(n) if log else i / n) if i < n else None
    if kind == "WarmupCosineLR":
        if rise is not None:
            return base * (start * (1 - rise) + rise)
        angle = math.pi * min(1.0, (i + 1 - n) / max(1, end - n))
        return base * (c + (1 - c) * math.cos(angle / 2) ** 2)
    if rise is None:
        rise = 1.0 if kind == "WarmupLR" else max(0.0, 1 - (i - n) / max(1, end - n) if end > n else float(end - i))
    return low * (1 - rise) + high * rise


@pytest.mark.parametrize("kind", sorted(WARMUPS))
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_rate_follows_the_formula(kind, data):
    n = data.draw(st.integers(1, 40))
    total = data.draw(st.integers(1, 80))
    base, low, high = (data.draw(st.floats(0, 0.1)) for _ in range(3))
    log = data.draw(st.booleans())
    start, c = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1))
    extra = {
        "WarmupLR": {"warmup_min_lr": low, "warmup_max_lr": high},
        "WarmupDecayLR": {"warmup_min_lr": low, "warmup_max_lr": high, "total_num_steps": total},
        "WarmupCosineLR": {"warmup_min_ratio": start, "cos_min_ratio": c, "total_num_steps": total},
    }[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schedule = WARMUPS[kind](
            optimizer(base, base / 2), warmup_num_steps=n, warmup_type="log" if log else "linear", **extra
        )
    for step, rates in enumerate(run(schedule, 90)):
        for own, rate in zip((base, base / 2), rates, strict=True):
            expected = oracle(kind, step, base=own, low=low, high=high, n=n, log=log, end=total, start=start, c=c)
            assert rate == pytest.approx(expected, rel=1e-9, abs=1e-15), (step, own)


def test_known_points():
    assert [rates[0] for rates in run(WarmupLR(optimizer(0.5), 0.0, 1.0, 4, "linear"), 7)] == [
        0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0,
    ]  # fmt: skip
    decay = [rates[0] for rates in run(WarmupDecayLR(optimizer(0.5), 6, 0.0, 1.0, 2, "linear"), 10)]
    assert decay == [0.0, 0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    cosine = [rates[0] for rates in run(WarmupCosineLR(optimizer(2.0), 6, 0.5, 2, 0.1, "linear"), 10)]
    assert cosine[:3] == [0.0, 1.0, 1.5]
    assert cosine[6:] == pytest.approx([0.2] * 4)
    assert cosine[4] == pytest.approx(2.0 * (0.1 + 0.9 / 2))


def test_each_group_rises_to_its_own_rate_without_a_maximum():
    assert run(WarmupLR(optimizer(0.1, 0.01), warmup_num_steps=2), 5)[-1] == [0.1, 0.01]


def test_rates_per_group():
    schedule = WarmupLR(optimizer(1.0, 1.0), [0.1, 0.2], [0.3, 0.4], 2, "linear")
    assert schedule.get_last_lr() == [0.1, 0.2]
    assert run(schedule, 5)[-1] == [0.3, 0.4]
    with pytest.raises(ValueError, match="one rate for each of 2 parameter groups, got 1"):
        WarmupLR(optimizer(1.0, 1.0), [0.1])


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 17])
@pytest.mark.parametrize(
    "make",
    [
        lambda o: WarmupLR(o, 0.01, 0.3, 4),
        lambda o: WarmupDecayLR(o, 12, 0.01, 0.3, 4),
        lambda o: WarmupCosineLR(o, 12, 0.1, 4),
    ],
)
def test_a_resumed_schedule_goes_on_with_the_same_bits(make, stop):
    whole = run(make(optimizer(0.3, 0.1)), 24)
    first = make(optimizer(0.3, 0.1))
    assert run(first, stop) == whole[:stop]
    state = copy.deepcopy(first.state_dict())
    second = make(optimizer(0.3, 0.1))
    second.load_state_dict(state)
    assert run(second, 24 - stop) == whole[stop:]
    third = make(optimizer(0.3, 0.1))
    third.load_state_dict({"last_batch_iteration": stop - 1})  # what DeepSpeed saves
    assert run(third, 24 - stop) == whole[stop:]


def test_resuming_through_the_constructor():
    whole = run(WarmupLR(optimizer(0.3), 0.0, 0.3, 8), 12)
    resumed = optimizer(0.3)
    resumed.param_groups[0]["initial_lr"] = 0.3
    schedule = WarmupLR(resumed, 0.0, 0.3, 8, last_batch_iteration=4)
    assert schedule.last_batch_iteration == 4
    assert run(schedule, 7) == whole[5:]


def test_a_tensor_rate_is_updated_in_place():
    rate = torch.tensor(0.5)
    schedule = WarmupLR(optimizer(rate), 0.0, 1.0, 4, "linear")
    schedule.load_state_dict({"last_batch_iteration": 2})
    assert schedule.optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5
    schedule.load_state_dict({"last_batch_iteration": 3})
    assert rate.item() == 0.75


def test_torch_takes_them_for_schedulers():
    schedule = WarmupLR(optimizer(0.1), 0.0, 0.1, 2)
    chained = torch.optim.lr_scheduler.ChainedScheduler([schedule])
    assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            schedule.optimizer.step()
            chained.step()
    assert schedule.last_batch_iteration == 3


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda o: WarmupLR(o, warmup_num_steps=0), "warmup_num_steps: expected an integer of at least 1, got 0"),
        (lambda o: WarmupLR(o, warmup_num_steps=True), "warmup_num_steps"),
        (lambda o: WarmupLR(o, warmup_num_steps=1.5), "warmup_num_steps"),
        (lambda o: WarmupLR(o, warmup_type="cubic"), "'log' or 'linear', got 'cubic'"),
        (lambda o: WarmupLR(o, last_batch_iteration=-2), "last_batch_iteration"),
        (lambda o: WarmupDecayLR(o, 0), "total_num_steps: expected an integer of at least 1, got 0"),
        (lambda o: WarmupCosineLR(o, 10, cos_min_ratio=1.5), "cos_min_ratio: expected a number from 0 to 1, got 1.5"),
        (lambda o: WarmupCosineLR(o, 10, warmup_min_ratio=-0.1), "warmup_min_ratio"),
    ],
)
def test_wrong_parameters_are_named(make, line):
    with pytest.raises(ValueError, match=line):
        make(optimizer(0.1))


def test_an_end_before_the_end_of_the_warm_up_is_said():
    with pytest.warns(UserWarning, match="total_num_steps 5 is below warmup_num_steps 10"):
        WarmupDecayLR(optimizer(0.1), 5, warmup_num_steps=10)

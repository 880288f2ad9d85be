"""Which units are at home on the device: what fits, what is asked for, and what cannot be."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from torch import nn

import zeroxide
from simulated import engines
from zeroxide.config import load
from zeroxide.errors import BudgetError, ConfigError, DeviceError, ModelError
from zeroxide.plan.on_device import place_state

WIDTH = 512
LAYER = WIDTH * WIDTH * 2
"""Bytes of the bf16 weights of a layer; its state in the split format takes 5 times as much, its gradients as much."""


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(8)))


def config(zero: dict | None = None, **own) -> dict:
    return {
        "optimizer": {"type": "AdamW"},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, **(zero or {})},
        "zeroxide": {"device": "sim", "threads": 1, **own},
    }


def made(zero: dict | None = None, **own) -> zeroxide.Engine:
    return zeroxide.initialize(model=model(), config=config(zero, **own))[0]


def in_use(sim) -> int:
    """Bytes that engines of other tests may have left to the collector."""
    gc.collect()
    return sim.usage().in_use


def ratio(value: float) -> dict:
    return {"offload_optimizer": {"device": "cpu", "ratio": value}}


@pytest.mark.parametrize(
    ("layers", "units"), [(13.99, []), (14.0, [0]), (20.0, [0, 1]), (25.99, [0, 1]), (56.0, list(range(8)))]
)
def test_as_much_is_on_the_device_as_its_budget_holds(layers, units, sim):
    """Weights of all 8 layers come first, and each unit takes 6 times its weights beside them. Catches: a unit that is
    left out though it fits, or is taken though it does not, by a byte."""
    with engines.followed(kernels=True):
        engine = made(device_memory=int(layers * LAYER))
        try:
            assert sorted(engine.plan().units_on_device) == units
            planned = engine.plan().numbers.device_buckets
            assert planned == {
                "weights": 8 * LAYER,
                "gradients": len(units) * LAYER,
                "optimizer": 5 * len(units) * LAYER,
            }
            assert engine.memory()["optimizer"]["peak"] == 5 * (8 - len(units)) * LAYER
            assert engine.memory()["weights"]["peak"] == (8 - len(units)) * LAYER
        finally:
            engine.destroy()


@pytest.mark.parametrize(("value", "count"), [(1.0, 0), (0.9, 0), (0.5, 4), (0.3, 5), (0.0, 8)])
def test_a_ratio_is_what_the_cpu_updates_at_least(value, count, sim):
    with engines.followed(kernels=True):
        engine = made(ratio(value))
        try:
            assert sorted(engine.plan().units_on_device) == list(range(count))
            assert any("optimizer state in" in line for line in engine.plan().describe())
        finally:
            engine.destroy()


@pytest.mark.parametrize(
    ("zero", "limit", "help"),
    [
        ({"offload_optimizer": {"device": "cpu"}}, 8 * LAYER - 1, "offload_param"),
        (ratio(0.0), 50 * LAYER, "offload_optimizer.ratio"),
    ],
)
def test_a_budget_that_is_too_small_is_one_line_with_the_numbers(zero, limit, help, sim):
    with engines.followed(kernels=True), pytest.raises(BudgetError, match=r"zeroxide\.device_memory") as caught:
        made(zero, device_memory=limit)
    assert help in str(caught.value)
    assert caught.value.need > caught.value.limit
    assert caught.value.bucket == "device"


def test_without_a_budget_half_of_the_device_is_left_to_activations(sim):
    """Catches: a default that takes all that is free, or that counts the model's own weights as lost."""
    with engines.followed(kernels=True):
        found = {}
        for layers in (20, 56):
            # Half of it, what others use, and no more.
            sim.set_memory_limit(2 * (layers * LAYER + in_use(sim)))
            moved = model().to("sim")
            engine = zeroxide.initialize(model=moved, config=config())[0]
            found[layers] = len(engine.plan().units_on_device)
            engine.destroy()
            del engine, moved
        sim.set_memory_limit(32 << 30)
    assert found == {20: 2, 56: 8}


def test_a_device_that_is_full_is_one_line_and_nothing_is_lost(sim):
    """Catches: an error of torch's, a model that has lost its weights."""
    given = model()
    before = [param.clone() for param in given.parameters()]
    with engines.followed(kernels=True):
        sim.set_memory_limit(in_use(sim) + 30 * LAYER)
        try:
            with pytest.raises(DeviceError, match="no room for the optimizer state of 4") as caught:
                zeroxide.initialize(model=given, config=config(ratio(0.0)))
        finally:
            sim.set_memory_limit(32 << 30)
    assert caught.value.need == 56 * LAYER
    assert "zeroxide.device_memory" in str(caught.value)
    assert all(torch.equal(one, other) for one, other in zip(given.parameters(), before, strict=True))


def test_without_kernels_state_stays_in_host_memory_with_one_line(caplog, sim):
    with engines.followed(), caplog.at_level(logging.WARNING, "zeroxide"):
        engine = made()
        assert engine.plan().units_on_device == frozenset()
        engine.destroy()
        with pytest.raises(DeviceError, match=r"ratio = 0\.5 needs kernels on sim:0: there are no kernels"):
            made(ratio(0.5))
    lines = [record.getMessage() for record in caplog.records if "kernels" in record.getMessage()]
    assert lines == ["optimizer state stays in host memory, where the CPU updates it: there are no kernels for sim:0"]


@pytest.mark.parametrize(
    ("zero", "device", "world", "line"),
    [
        ({}, "sim:0", 2, "with several ranks, 2 here, the CPU updates all of the state"),
        ({"offload_param": {"device": "cpu"}}, "sim:0", 1, "parameters that leave the device"),
        ({}, "cpu", 1, "the model computes in host memory"),
    ],
)
def test_a_share_that_cannot_be_on_the_device_is_refused_by_name(zero, device, world, line):
    asked = load(config({**ratio(0.5), **zero}))
    with engines.followed(kernels=True), pytest.raises(ConfigError, match=line) as caught:
        place_state(asked, model(), torch.device(device), world)
    assert caught.value.path == "zero_optimization.offload_optimizer.ratio"
    # And where nobody asks, it stays in host memory.
    plain = load(config({**zero, "offload_optimizer": {"device": "none"}}))
    assert place_state(plain, model(), torch.device(device), world)[1] is None


def test_sparse_gradients_keep_state_in_host_memory():
    """Catches: state on a device whose first backward would be refused, where nobody has asked for it there."""
    sparse = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 4))
    with engines.followed(kernels=True):
        assert place_state(load(config()), sparse, torch.device("sim:0"), 1)[1] is None
        with pytest.raises(ConfigError, match="gradients of 0 are sparse, and only the CPU adds up rows"):
            place_state(load(config(ratio(0.5))), sparse, torch.device("sim:0"), 1)
        assert place_state(load(config()), sparse[1], torch.device("sim:0"), 1)[1] is not None


def test_a_budget_of_a_device_without_a_device_is_told(caplog):
    with caplog.at_level(logging.WARNING, "zeroxide"):
        place_state(load(config(device_memory="1GiB")), model(), torch.device("cpu"), 1)
    assert "zeroxide.device_memory has no effect" in caplog.text


@pytest.mark.parametrize(
    ("zero", "asked", "line"),
    [
        (ratio(0.5), None, "optim_states, hp_params, lp_grads, contiguous_grad_buffer of 4 units are at home on sim"),
        (ratio(0.5), ["optim_states"], 'set zero_optimization.offload_optimizer to {"device": "cpu"}'),
        (ratio(0.5), ["lp_params"], "the weights stay on sim"),
        (ratio(1.0), None, "leave lp_params out of include"),
        (ratio(1.0), ["optim_states", "hp_params", "contiguous_grad_buffer"], None),
        ({**ratio(1.0), "offload_param": {"device": "cpu"}}, None, None),
    ],
)
def test_states_that_are_to_leave_the_device(zero, asked, line, sim):
    """Catches: state that stays, and nobody is told."""
    with engines.followed(kernels=True):
        engine = made(zero)
        try:
            for call in (engine.offload_states, engine.optimizer.offload_states):
                if line is None:
                    call(include=asked)
                    engine.reload_states()
                    engine.empty_partition_cache()
                else:
                    with pytest.raises(ModelError) as caught:
                        call(include=asked)
                    assert line in str(caught.value)
        finally:
            engine.destroy()

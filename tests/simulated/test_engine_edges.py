"""Values of weights on a device that the core is asked for, or that change by another way than a step; and ends."""

from __future__ import annotations

import gc
import logging
from types import SimpleNamespace

import pytest
import torch
from models import build, loss_of, tokens
from torch import nn

import zeroxide
from simulated import engines
from zeroxide.device.transfers import Cuda
from zeroxide.engine import build as build_steps
from zeroxide.zero.passes import PassState

HOMES = {"resident": {"stage": 2}, "resident-3": {"stage": 3}, "transient": {"stage": 3, "offload_param": "cpu"}}


@pytest.fixture(autouse=True)
def followed(sim):
    sim.set_delay(0, 100, seed=6)
    with engines.followed():
        yield
    assert [str(each) for each in sim.races()] == []


def started(home: str, where: str = "sim", model: nn.Module | None = None) -> zeroxide.Engine:
    zero = {key: value if key == "stage" else {"device": value} for key, value in HOMES[home].items()}
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zeroxide": {"device": where, "threads": 1},
    }
    return zeroxide.initialize(model=build("gpt") if model is None else model, config=config)[0]


def step(engine: zeroxide.Engine, seed: int) -> float:
    batch = {n: v.to(engine.device) for n, v in tokens(torch.Generator().manual_seed(seed)).items()}
    loss = loss_of(engine(**batch))
    engine.backward(loss)
    engine.step()
    return loss.item()


def edit(engine: zeroxide.Engine, value: float) -> torch.Tensor:
    weight = engine.module.h[1].up.weight
    with torch.no_grad():
        weight.fill_(value)
    return weight


@pytest.mark.parametrize("read", ["save", "export", "state", "fp32", "gathered"])
def test_an_edit_is_there_for_whoever_asks_next(read, tmp_path):
    """Catches: old values in a checkpoint, an export or an answer, because no step came between."""
    engine = started("resident")
    step(engine, 0)
    weight = edit(engine, 0.5)
    if read == "save":
        engine.save_checkpoint(tmp_path)
        edit(engine, 0.25)
        engine.load_checkpoint(tmp_path)
        found = weight.detach()
    elif read == "export":
        path = engine.save_16bit_model(tmp_path)
        other = started("resident", "cpu")
        from safetensors.torch import load_file

        found = load_file(path)["h.1.up.weight"]
        other.destroy()
    elif read == "state":
        found = engine.module_state_dict()["h.1.up.weight"]
    elif read == "fp32":
        found = zeroxide.safe_get_full_fp32_param(weight)
    else:
        with zeroxide.zero.GatheredParameters([weight]):
            found = weight.detach().clone()
    assert found.eq(0.5).all()
    engine.destroy()


@pytest.mark.parametrize("home", ["resident", "resident-3"])
def test_a_change_of_one_parameter_moves_one_unit(home, sim):
    """Catches: all weights sent up for every parameter of a state dict that is loaded."""
    engine = started(home)
    step(engine, 0)
    batch = {n: v.to("sim") for n, v in tokens(torch.Generator().manual_seed(0)).items()}
    with torch.no_grad():
        engine(**batch)
        sim.reset_bytes()
        weight = engine.module.h[1].up.weight
        zeroxide.safe_set_full_fp32_param(weight, torch.full((144, 48), 0.25))
        engine(**batch)
    (nbytes,) = {u.memory.nbytes for u in engine.parts.units if any(p is weight for p in u.params)}
    # Beside it the batch.
    assert nbytes <= sim.usage().up < 2 * nbytes
    engine.destroy()


def test_an_edit_survives_a_change_of_another_parameter():
    engine = started("resident")
    weight = edit(engine, 0.5)
    zeroxide.safe_set_full_fp32_param(engine.module.h[0].up.weight, torch.zeros(144, 48))
    step(engine, 0)
    assert weight.detach().sub(0.5).abs().max() < 0.1
    engine.destroy()


@pytest.mark.parametrize("change", ["set", "gathered", "load"])
def test_a_change_by_the_engine_is_shown_at_once(change, tmp_path):
    """Catches: parameters that show what they were until the next forward, and an edit of that which is lost."""
    engine = started("resident")
    weight = engine.module.h[1].up.weight
    if change == "set":
        zeroxide.safe_set_full_fp32_param(weight, torch.full((144, 48), 0.25))
    elif change == "gathered":
        with zeroxide.zero.GatheredParameters([weight], modifier_rank=0), torch.no_grad():
            weight.fill_(0.25)
    else:
        edit(engine, 0.25)
        engine.save_checkpoint(tmp_path)
        edit(engine, 1.0)
        engine.load_checkpoint(tmp_path)
    assert weight.detach().eq(0.25).all()
    with torch.no_grad():
        weight.add_(1)
    assert zeroxide.safe_get_full_fp32_param(weight).eq(1.25).all()
    engine.destroy()
    assert weight.detach().eq(1.25).all()


def test_the_end_takes_no_memory_and_leaves_none(sim):
    """Catches: a second copy of all weights when the engine ends, memory that waits for the garbage collector."""
    for home in HOMES:
        before = sim.usage().in_use
        engine = started(home)
        step(engine, 0)
        gc.collect()
        sim.reset_peak_memory_stats()
        held = sim.usage().in_use
        gc.disable()
        try:
            engine.destroy()
            assert sim.usage().peak <= held, home
            if HOMES[home]["stage"] == 3:
                assert sim.usage().in_use - before < 4096, home
        finally:
            gc.enable()
        del engine
        gc.collect()
        assert sim.usage().in_use - before < 4096, home


@pytest.mark.parametrize("home", HOMES)
def test_a_forward_that_asks_for_a_gradient(home):
    """Catches: weights that are shown where they are not, and a backward that ends in the middle of a forward."""

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
            self.hidden = [self.b.bias]

        def forward(self, x):
            x = x.requires_grad_()
            h = self.a(x) * self.hidden[0]
            (g,) = torch.autograd.grad((h**2).sum(), h, retain_graph=True)
            (k,) = torch.autograd.grad(h.sum(), x, retain_graph=True)
            states.append(engine.parts.hooks.current.state)
            return self.c(self.b(h) * self.hidden[0] + g + k).square().sum()

    found, states = [], []
    for where in ("sim", "cpu"):
        torch.manual_seed(0)
        engine = started(home, where, Asks())
        losses = []
        for _ in range(2):
            loss = engine(torch.ones(3, 6, device=where))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        found.append(losses)
        engine.destroy()
    assert found[0] == found[1]
    assert set(states) == {PassState.FORWARD}


def test_weights_are_used_after_a_backward_of_torchs_own():
    """Catches: autograd's thread taken for the one that runs the model."""
    engine = started("transient")
    batch = {n: v.to("sim") for n, v in tokens(torch.Generator().manual_seed(0)).items()}
    loss_of(engine(**batch)).backward()
    assert engine.module.h[1].up.weight.norm().item() > 0
    engine.step()
    engine.destroy()


def test_a_view_that_is_read_between_a_change_and_the_next_use():
    """Catches: new values that arrive while the old ones are read."""
    engine = started("resident-3", model=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    kept: list[torch.Tensor] = []
    engine.module[1].register_forward_hook(lambda module, args, output: kept.append(module.weight.detach()))
    x = torch.ones(2, 8, device="sim")
    with torch.no_grad():
        engine(x)
        zeroxide.safe_set_full_fp32_param(engine.module[1].weight, torch.full((8, 8), 0.25))
        kept[0].sum()
        engine(x)
    assert kept[0].eq(0.25).all()
    engine.destroy()


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("failing", ["hooks", "parameters", "show"])
def test_a_construction_that_fails_late_gives_the_values_back(failing, home, sim, monkeypatch):
    """Catches: parameters left on the device, or without values, and device memory that stays."""

    def fail(under_way):
        raise RuntimeError("injected")

    steps = tuple((name, fail if name == failing else act) for name, act in build_steps.STEPS)
    monkeypatch.setattr(build_steps, "STEPS", steps)
    model, before = build("gpt"), sim.usage().in_use
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="injected"):
        started(home, model=model)
    assert {each.device.type for each in model.parameters()} == {"cpu"}
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    gc.collect()
    assert sim.usage().in_use - before < 4096


def test_two_streams_wait_for_one_copy():
    """Catches: a copy up that only the first stream to use it has waited for."""
    engine = started("resident-3", model=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    x, stream = torch.ones(2, 8, device="sim"), torch.Stream("sim")
    engine.backward(engine(x).sum())
    engine.step()
    main = torch.accelerator.current_stream()
    stream.wait_stream(main)
    with torch.no_grad():
        with stream:
            engine(x)
        engine(x)
    main.wait_stream(stream)
    engine.destroy()


def test_memory_that_cannot_be_locked_is_copied_through_blocks(sim, caplog):
    losses = []
    for limit in (1 << 40, 1 << 12):
        sim.set_register_limit(limit)
        try:
            with caplog.at_level(logging.WARNING, logger="zeroxide"):
                caplog.clear()
                engine = started("resident")
        finally:
            sim.set_register_limit(1 << 40)
        losses.append([step(engine, seed) for seed in range(2)])
        engine.destroy()
    assert "cannot be locked in place" in caplog.text
    assert losses[0] == losses[1]


def test_registration_by_the_driver():
    """No driver is here: what it is asked, and what becomes of its answers."""
    calls = []

    def register(address, nbytes, flags):
        calls.append((address.value, nbytes.value, flags.value))
        return 1 if nbytes.value > 4096 else 0

    driver = SimpleNamespace(cuMemHostRegister_v2=register, cuMemHostUnregister=lambda address: 713)
    registry = Cuda(driver)
    assert registry.register(1 << 40, 4096) is None
    assert registry.register(1 << 41, 8192) == "cuMemHostRegister: error 1"
    assert calls == [(1 << 40, 4096, 0), (1 << 41, 8192, 0)]
    assert registry.unregister(1 << 40) == "cuMemHostUnregister: error 713"

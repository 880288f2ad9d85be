"""A device that is lost, and a step that fails half way: one line from then on, and what was saved or is in host memory
stays."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from launching import run_ranks
from torch import nn

import zeroxide
from simulated import engines
from simulated.kernels import PlayedKernels
from zeroxide.device import host_pool
from zeroxide.errors import DeviceError, ModelError
from zeroxide.zero import saved_activations

CPU = {"offload_optimizer": {"device": "cpu"}}
MODES = {
    "resident": {"stage": 2, **CPU},
    "resident-3": {"stage": 3, **CPU},
    "transient": {"stage": 3, "offload_param": {"device": "cpu"}, **CPU},
    "on-device": {"stage": 3},
    "on-device-shown": {"stage": 2},
    "half": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
    "activations": {"stage": 3, **CPU},
}
IN_HOST = {"resident", "resident-3", "transient", "activations"}
"""Where all state is in host memory."""
EVERY = {"transient": 1, "activations": 2}
"""Of the operations of a step, every so many is one after which the device is lost; 3 elsewhere."""
LOST = (
    r"sim:0 was lost while .*: sim:0 is lost: .*; this process cannot use it any more: start a new one from the last c"
)
MIXED = r"^optimizer step \d failed half way on the device and its state is mixed; resume from the last checkpoint \("


@pytest.fixture(autouse=True)
def quick(sim, monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(saved_activations, "MIN_BYTES", 64)
    monkeypatch.setattr(host_pool, "GRAIN", 4096)
    monkeypatch.setattr(host_pool, "SLAB", 8 * 4096)
    sim.set_delay(0, 20, seed=3)
    with engines.followed(kernels=True), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield
    assert [str(each.message) for each in warned] == []
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def made(mode: str, model: nn.Module | None = None, *, background: bool = False) -> zeroxide.Engine:
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "bf16": {"enabled": True},
        "zero_optimization": MODES[mode],
        "activation_checkpointing": {"cpu_checkpointing": mode == "activations"},
        "zeroxide": {"device": "sim", "threads": 1, "checkpoint_background": background},
    }
    return zeroxide.initialize(model=fresh() if model is None else model, config=config)[0]


def batch(engine: zeroxide.Engine, seed: int) -> torch.Tensor:
    values = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    return values.to(engine.device, torch.bfloat16)


def step(engine: zeroxide.Engine, x: torch.Tensor) -> None:
    engine.backward(engine(x).float().square().mean())
    engine.step()


def exact(engine: zeroxide.Engine) -> list[torch.Tensor]:
    return [zeroxide.safe_get_full_fp32_param(param).clone() for param in engine.module.parameters()]


def refused(call: Callable[[], object], line: str) -> str:
    with pytest.raises(DeviceError, match=line) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lose_in_a_step(mode: str, after: int, folder, sim) -> str:
    """The line of an engine whose device is lost so many operations into its second step; "" if it is not."""
    engine, found = made(mode), ""
    try:
        step(engine, batch(engine, 0))
        x, before = batch(engine, 1), exact(engine)
        sim.lose(after=after)
        try:
            step(engine, x)
            return ""
        except DeviceError as error:
            found = str(error)
        except RuntimeError:
            # An operator of the script's own, outside of the engine.
            pass
        for call in (lambda: engine(x), engine.step, lambda: engine.load_checkpoint(folder / "before")):
            line = refused(call, rf"{LOST}|{MIXED}{LOST}")
            assert (found or line) in line
            found = found or line
        if mode not in IN_HOST:
            refused(lambda: exact(engine), rf"{LOST}|{MIXED}{LOST}")
        elif "a step was made" in found and "weights went up" in found:
            for call in (lambda: exact(engine), lambda: engine.save_checkpoint(folder / "after")):
                refused(call, rf"{LOST}|{MIXED}{LOST}")
        else:
            assert all(map(torch.equal, exact(engine), before))
            engine.save_checkpoint(folder / "after")
    finally:
        engine.destroy()
        sim.reset()
    return found


@pytest.mark.parametrize("mode", MODES)
def test_wherever_in_a_step_a_device_is_lost_one_line_says_so(mode, tmp_path, sim):
    """Catches: an error of torch's, a line that hides what was going on, hooks that stay, an end that fails, state in
    host memory that nobody can save, state of two steps that is taken for one."""
    engine = made(mode)
    step(engine, batch(engine, 0))
    engine.save_checkpoint(tmp_path / "before")
    step(engine, batch(engine, 1))
    expected = exact(engine)
    engine.destroy()
    lines, after = set(), 0
    while line := lose_in_a_step(mode, after, tmp_path, sim):
        lines.add(line.partition(": ")[0].removeprefix("sim:0 was lost while "))
        after += EVERY.get(mode, 3)
    assert {"the model ran forward", "backward ran", "a step was made"} & {line.split(" and ")[0] for line in lines}
    for saved in ["before", "after"] if mode in IN_HOST else ["before"]:
        engine = made(mode)
        engine.load_checkpoint(tmp_path / saved)
        step(engine, batch(engine, 1))
        assert all(map(torch.equal, exact(engine), expected))
        engine.destroy()


def test_a_backward_of_torchs_own_that_is_lost_is_told_by_the_next_call(sim):
    """Catches: a pass that is taken to be under way for ever."""
    for mode in ("resident-3", "transient", "on-device"):
        engine = made(mode)
        x = batch(engine, 0)
        loss = engine(x).float().square().mean()
        sim.lose(after=2)
        with pytest.raises(RuntimeError, match="sim:0 is lost"):
            loss.backward()
        assert refused(lambda engine=engine, x=x: engine(x), LOST) == refused(engine.step, LOST)
        engine.destroy()
        sim.reset()


def test_an_end_is_no_error(caplog, sim):
    """Where it is the first to find the device lost, it says so, and else nothing. Catches: an end that fails."""
    for known in (False, True):
        engine = made("transient")
        x = batch(engine, 0)
        step(engine, x)
        sim.lose()
        if known:
            refused(lambda engine=engine, x=x: engine(x), LOST)
        caplog.clear()
        engine.destroy()
        assert [re.search(LOST, each) is not None for each in caplog.messages] == ([] if known else [True])
        sim.reset()


@pytest.mark.parametrize("mode", ["resident", "transient", "on-device"])
def test_a_construction_that_is_lost_gives_back_what_was_in_host_memory(mode, sim):
    """Catches: an error of torch's, values of the model's that nobody has any more."""
    model = fresh()
    before = [param.detach().clone() for param in model.parameters()]
    lines, after = set[str](), 0
    while True:
        sim.lose(after=after)
        try:
            engine = made(mode, model=model)
        except DeviceError as error:
            lines.add(str(error))
        else:
            break
        finally:
            sim.reset()
        if mode == "on-device" and not model[0].weight.numel() * model[2].bias.numel():
            # They had moved, and nobody has them any more.
            with pytest.raises(ModelError, match="lost weights when its engine could not be made"):
                model.state_dict()
            model = fresh()
        assert all(map(torch.equal, model.parameters(), before))
        after += 1
    engine.destroy()
    assert all(re.fullmatch(LOST + "heckpoint", line) and "while the engine was made" in line for line in lines)
    assert lines


def test_a_save_in_the_background_that_is_lost_leaves_the_one_before(tmp_path, sim):
    """Catches: an end that waits for ever, a checkpoint with what nobody could read."""
    engine = made("on-device", background=True)
    step(engine, batch(engine, 0))
    engine.save_checkpoint(tmp_path / "before")
    engine.wait_for_checkpoint()
    step(engine, batch(engine, 1))
    expected = exact(engine)
    sim.lose(after=5)
    engine.save_checkpoint(tmp_path / "after")
    refused(engine.wait_for_checkpoint, LOST)
    engine.destroy()
    sim.reset()
    assert not list((tmp_path / "after").glob("global_step*"))
    engine = made("on-device")
    engine.load_checkpoint(tmp_path / "before")
    step(engine, batch(engine, 1))
    assert all(map(torch.equal, exact(engine), expected))
    engine.destroy()


class Fails(PlayedKernels):
    """Refuses the launch with this number of kernels that update."""

    at = -1

    def launch(self, kernel, blocks, args):
        if kernel.source == "adam":
            type(self).at -= 1
            if type(self).at == -1:
                raise DeviceError(f"kernel {kernel.entry} was refused")
        super().launch(kernel, blocks, args)


def says(call: Callable[[], object], line: str) -> bool:
    try:
        call()
    except DeviceError as error:
        return re.search(line, str(error)) is not None
    return False


@pytest.mark.parametrize("mode", ["on-device", "half"])
def test_a_step_that_fails_half_way_is_what_every_later_call_says(mode, tmp_path, monkeypatch, sim):
    """Units before the one that fails are updated, those after it are not, those in host memory either. Catches: a call
    that goes on, for units on either side."""
    monkeypatch.setitem(engines.LAUNCHERS, "sim", Fails)
    engine = made(mode)
    x = batch(engine, 1)
    engine.save_checkpoint(tmp_path)
    step(engine, x)
    loss = engine(x).float().square().mean()
    engine.backward(loss)
    Fails.at = len(engine.plan().units_on_device) - 1
    refused(engine.step, "^kernel zx_adamw_split was refused")
    params = dict(engine.module.named_parameters())
    line = MIXED + r"kernel zx_adamw_split was refused\)$"
    calls = [
        lambda: engine(x),
        lambda: engine.module(x),
        engine.step,
        engine.finish_step,
        lambda: engine.save_checkpoint(tmp_path),
        lambda: engine.save_16bit_model(tmp_path),
        lambda: engine.load_checkpoint(tmp_path),
        engine.module_state_dict,
        lambda: copy.deepcopy(engine.optimizer.state_dict()),
    ]
    for name in ("0.weight", "2.weight"):
        calls += [
            lambda name=name: zeroxide.safe_get_full_fp32_param(params[name]),
            lambda name=name: zeroxide.safe_get_full_optimizer_state(params[name], "exp_avg"),
            lambda name=name: zeroxide.safe_set_full_fp32_param(params[name], torch.zeros(8, 8)),
        ]
    assert [number for number, call in enumerate(calls) if not says(call, line)] == []
    engine.destroy()
    engine = made(mode)
    engine.load_checkpoint(tmp_path)
    step(engine, x)
    engine.destroy()


@pytest.mark.parametrize(("transport", "after"), [("auto", 4), ("collective", 12)])
def test_a_rank_whose_device_is_lost_ends_the_others(transport, after):
    """Catches: ranks that wait for one that computes no more."""
    first, second = run_ranks(2, Path(__file__).with_name("lost_ranks.py"), [transport, str(after)])
    assert second.code != 0
    assert first.code != 0
    assert "zeroxide.errors.DeviceError: sim:1 was lost while " in second.err.splitlines()[-1], second.err
    assert "rank 1" in first.err.splitlines()[-1], first.err

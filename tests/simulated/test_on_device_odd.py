"""Odd models and odd calls with units at home on the device: as in host memory, bit for bit, or the same refusal."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

import zeroxide
from simulated import engines
from simulated.programs import run
from zeroxide.errors import ModelError

PLACES = {
    "cpu": ("cpu", {}),
    "host": ("sim", {"offload_optimizer": {"device": "cpu"}}),
    "none": ("sim", {}),
    "half": ("sim", {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}),
}


@pytest.fixture(autouse=True)
def quick(sim):
    sim.set_delay(0, 50, seed=11)
    with engines.followed(kernels=True):
        yield
    assert [str(each) for each in sim.races()] == []


class Odd(nn.Module):
    """Parameters with no element, of one element, of no dimension, and frozen ones of other dtypes in their units."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.first.none = nn.Parameter(torch.empty(0, 3))
        self.first.scale = nn.Parameter(torch.tensor(1.5))
        self.first.wide = nn.Parameter(torch.linspace(0, 1, 3, dtype=torch.float64), requires_grad=False)
        self.last.codes = nn.Parameter(torch.arange(5, dtype=torch.int8), requires_grad=False)
        self.last.mask = nn.Parameter(torch.ones(3, dtype=torch.bool), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = (self.first(x) * self.first.scale).tanh()
        return self.last(hidden).float().square().mean() + 0 * self.first.none.sum().float()


def started(place: str, device: str | None = None, model: nn.Module | None = None) -> zeroxide.Engine:
    where, zero = PLACES[place]
    torch.manual_seed(0)
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "gradient_clipping": 0.5,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, **zero},
        "zeroxide": {"device": device or where, "threads": 1},
    }
    return zeroxide.initialize(model=Odd() if model is None else model, config=config)[0]


def micro(engine: zeroxide.Engine, seed: int) -> float:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).to(engine.device, torch.bfloat16)
    loss = engine(x)
    engine.backward(loss)
    engine.step()
    return loss.item()


def values(engine: zeroxide.Engine) -> list[torch.Tensor]:
    found = []
    for param in engine.module.parameters():
        with zeroxide.zero.GatheredParameters([param]):
            found.append(param.detach().cpu().clone())
        if param.requires_grad:
            found += [zeroxide.safe_get_full_fp32_param(param).clone()]
            found += [zeroxide.safe_get_full_optimizer_state(param, each).clone() for each in ("exp_avg", "exp_avg_sq")]
    return found


def trains(engine: zeroxide.Engine, folder) -> list:
    return [micro(engine, seed) for seed in range(4)]


def forgets(engine: zeroxide.Engine, folder) -> list:
    """In the middle of an accumulation, in both ways."""
    found = []
    for set_to_none in (True, False):
        found.append(micro(engine, 0))
        engine.zero_grad(set_to_none=set_to_none)
        found.append(micro(engine, 1))
    return found


def edits(engine: zeroxide.Engine, folder) -> list:
    found = trains(engine, folder)
    first = engine.module.first
    for param in (first.none, first.scale, first.wide, engine.module.last.codes):
        with zeroxide.zero.GatheredParameters([param], modifier_rank=0), torch.no_grad():
            param.add_(1)
    zeroxide.safe_set_full_fp32_param(first.none, torch.empty(0, 3))
    zeroxide.safe_set_full_optimizer_state(first.none, torch.empty(0, 3), "exp_avg")
    zeroxide.safe_set_full_grad(first.none, torch.empty(0, 3))
    engine.zero_grad()
    return found + trains(engine, folder)


def saves(engine: zeroxide.Engine, folder) -> list:
    """And loads in the middle of an accumulation."""
    found = trains(engine, folder)
    engine.save_checkpoint(folder)
    found.append(micro(engine, 7))
    engine.load_checkpoint(folder)
    return found + trains(engine, folder)


ACTS = [trains, forgets, edits, saves]


def outcome(act: Callable, place: str, folder) -> tuple[list, list[torch.Tensor]]:
    engine = started(place)
    try:
        return act(engine, folder / place), values(engine)
    finally:
        engine.destroy()


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_odd_parameters_are_what_they_are_in_host_memory(act, tmp_path):
    """Catches: a parameter without elements that a call stumbles over, bytes of frozen ones that are taken for state,
    gradients that outlive what forgets them."""
    expected = outcome(act, "cpu", tmp_path)
    for place in ("host", "none", "half"):
        got = outcome(act, place, tmp_path)
        assert got[0] == expected[0], place
        assert all(map(torch.equal, got[1], expected[1])), place


def test_a_checkpoint_is_loaded_into_another_placement_in_the_middle_of_an_accumulation(tmp_path):
    """Catches: gradients of before that are added to those of after."""
    engine = started("none")
    trains(engine, tmp_path)
    engine.save_checkpoint(tmp_path)
    expected = trains(engine, tmp_path), values(engine)
    engine.destroy()
    for place in PLACES:
        engine = started(place)
        micro(engine, 9)
        engine.load_checkpoint(tmp_path)
        assert trains(engine, tmp_path) == expected[0], place
        assert all(map(torch.equal, values(engine), expected[1])), place
        engine.destroy()


def test_what_is_thawed_is_refused_as_everywhere():
    engine = started("none")
    engine.module.first.wide.requires_grad_(True)
    with pytest.raises(ModelError, match=r"first\.wide was frozen when zeroxide\.initialize took the model over"):
        micro(engine, 0)
    engine.destroy()


def test_engines_that_follow_one_another_find_the_memory_of_those_before(sim):
    """Catches: state of a destroyed engine that stays on the device, also where the engine is still referred to."""
    kept, used = [], []
    gc.collect()
    before = sim.usage().in_use
    for _ in range(3):
        engine = started("none")
        micro(engine, 0), micro(engine, 1)
        held = sim.usage().in_use
        engine.destroy()
        gc.collect()
        kept.append(engine)
        used.append((held - before, sim.usage().in_use - before))
    assert len(set(used)) == 1, used
    # Parameters without elements, and no weights.
    assert used[0][1] < 4096 < used[0][0], used


@pytest.mark.parametrize("place", ["none", "half", "host"])
def test_two_engines_on_two_devices_do_not_meet(place, tmp_path):
    """torch's current device is that of the engine made last, or what the script says. Catches: kernels on the wrong
    device, streams of another one."""
    engine = started(place)
    expected = trains(engine, tmp_path), values(engine)
    engine.destroy()
    both = [started(place, "sim:0"), started(place, "sim:1")]
    found = [[], []]
    for seed in range(4):
        for number, engine in enumerate(both):
            found[number].append(micro(engine, seed))
    with torch.sim.device(1):
        results = [values(engine) for engine in both]
    torch.sim.set_device(0)
    for engine in both:
        engine.destroy()
    assert found == [expected[0]] * 2
    assert all(map(torch.equal, results[0], expected[1]))
    assert all(map(torch.equal, results[1], expected[1]))


FORKED = """
import os
from torch import nn
import zeroxide
from simulated import engines

with engines.followed(kernels=True):
    config = {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3}}
    config["zeroxide"] = {"device": "sim", "threads": 1}
    engine = zeroxide.initialize(model=nn.Linear(4, 4), config=config)[0]
    x = torch.ones(2, 4, device="sim")
    engine.backward(engine(x).sum())
    engine.step()
    child = os.fork()
    if child == 0:
        for call in (lambda: engine(x), engine.step, engine.finish_step):
            try:
                call()
                print("nothing")
            except Exception as error:
                print(type(error).__name__, str(error).splitlines()[0])
        engine.destroy()
        print("destroyed", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    engine.backward(engine(x).sum())
    engine.step()
    engine.destroy()
    print("parent")
"""


def test_a_forked_child_of_an_engine_on_a_device_is_refused_and_the_parent_goes_on():
    """Catches: a child that is told that the device is lost."""
    ended = run(FORKED)
    lines = ended.stdout.splitlines()
    assert lines[-2:] == ["destroyed", "parent"], ended.stdout + ended.stderr
    assert len(lines) == 5
    assert all("fork" in line and "lost" not in line for line in lines[:3]), lines


def test_rows_of_a_gradient_are_refused_where_state_is_on_the_device_and_added_up_elsewhere():
    """The simulated device has no sparse tensors: these are the host's. Catches: rows that are lost, or dropped without
    a word."""
    rows = torch.sparse_coo_tensor(torch.tensor([[1, 5, 1]]), torch.ones(3, 8), (8, 8))
    engine = started("none")
    unit = next(each for each in engine.parts.units if "first.weight" in each.names)
    position = unit.names.index("first.weight")
    with pytest.raises(ModelError, match=r"first\.weight is sparse, and its optimizer state is on the device"):
        engine.parts.hooks.reducer.accumulate_unusual(unit, position, rows)
    engine.destroy()
    engine = started("host")
    unit = engine.parts.units[unit.index]
    reducer = engine.parts.hooks.reducer
    reducer.check_open(unit)
    reducer.accumulate_unusual(unit, position, 2 * rows)
    # Of a backward by itself, whose loss is divided by the two micro-batches.
    assert torch.equal(zeroxide.safe_get_full_grad(unit.params[position]), rows.to_dense())
    engine.parts.hooks.end_backward()
    engine.zero_grad()
    engine.destroy()


@pytest.mark.parametrize("place", ["none", "host"])
def test_a_batch_on_the_wrong_device_is_torchs_error_and_leaves_nothing(place, tmp_path):
    """Catches: a pass that stays open, an error that is taken for a lost device."""
    engine = started(place)
    expected = trains(engine, tmp_path)
    engine.destroy()
    engine = started(place)
    for wrong in ("cpu", "sim:1"):
        with pytest.raises(RuntimeError, match="same device") as caught:
            engine(torch.ones(4, 8, dtype=torch.bfloat16, device=wrong))
        assert "lost" not in str(caught.value)
    assert trains(engine, tmp_path) == expected
    engine.destroy()


@pytest.mark.parametrize("place", ["none", "host"])
def test_a_stream_of_another_device_is_nothing_to_the_engine(place, tmp_path):
    """Catches: copies and kernels on what is current of another device."""
    engine = started(place)
    expected = trains(engine, tmp_path)
    engine.destroy()
    engine = started(place)
    with torch.Stream("sim:1"):
        assert trains(engine, tmp_path) == expected
    engine.destroy()

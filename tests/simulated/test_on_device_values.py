"""What scripts do to values of units that are at home on the device gives what it gives with state in host memory."""

from __future__ import annotations

import pytest
import torch

import zeroxide
from simulated import engines
from simulated.test_on_device import PLACES, Tied, batch, differing, engine_of, outcome, train
from zeroxide.device.placement import spec
from zeroxide.engine import build
from zeroxide.errors import CoreError

ON_DEVICE = ["none", "half", "all"]


@pytest.fixture(autouse=True)
def quick(sim):
    sim.set_delay(0, 100, seed=7)
    with engines.followed(kernels=True):
        yield
    assert [str(each) for each in sim.races()] == []


def backward(engine: zeroxide.Engine, number: int) -> None:
    engine.backward(engine(batch(engine, number)).float().square().mean())


def gradients(engine: zeroxide.Engine) -> dict[str, torch.Tensor | None]:
    return {name: zeroxide.safe_get_full_grad(param) for name, param in engine.module.named_parameters()}


def read_and_set(engine: zeroxide.Engine) -> list:
    """Reads and replaces everything that has a name, in the middle of an accumulation and between steps."""
    params = dict(engine.module.named_parameters())
    train(engine, 0, 2)
    assert all(value is None for value in gradients(engine).values())
    backward(engine, 4)
    found = [gradients(engine), engine.parts.core().grad_norm()[0]]
    weight, bias = params["first.weight"], params["first.bias"]
    zeroxide.safe_set_full_grad(weight, 2 * zeroxide.safe_get_full_grad(weight))
    found.append(engine.parts.core().grad_norm()[0])
    engine.step()
    backward(engine, 5)
    found.append(gradients(engine))
    engine.step()
    found.append(float(engine.get_global_grad_norm()))
    # A gradient where none has come, and no other.
    zeroxide.safe_set_full_grad(bias, torch.full((8,), 0.5))
    found.append(gradients(engine))
    engine.step(), engine.step()
    found.append(outcome(engine))
    for name in ("first.weight", "mixed.weight"):
        value = torch.linspace(-1, 1, 64).view(8, 8)
        zeroxide.safe_set_full_fp32_param(params[name], value)
        zeroxide.safe_set_full_optimizer_state(params[name], value.square(), "exp_avg_sq")
    found.append(outcome(engine))
    train(engine, 3, 1)
    backward(engine, 8)
    engine.zero_grad()
    found.append(engine.parts.core().grad_norm())
    return [*found, train(engine, 5, 1), outcome(engine)]


def edit(engine: zeroxide.Engine) -> list:
    """Weights changed where they are, in each of the ways that scripts have."""
    params = dict(engine.module.named_parameters())
    train(engine, 0, 1)
    changed = [params["first.weight"], params["frozen.bias"]]
    with zeroxide.zero.GatheredParameters(changed, modifier_rank=0), torch.no_grad():
        changed[0][0].fill_(0.25)
        changed[1].fill_(0.5)
    found = [outcome(engine)]
    state = {name: value.clone() for name, value in engine.module_state_dict().items()}
    found.append(train(engine, 1, 1))
    engine.load_module_state_dict(state)
    found += [outcome(engine), train(engine, 2, 1)]
    kept = engine.optimizer.state_dict()
    saved = {**kept, "state": {at: {k: v.clone() for k, v in each.items()} for at, each in kept["state"].items()}}
    found.append(train(engine, 3, 1))
    engine.optimizer.load_state_dict(saved)
    return [*found, outcome(engine), train(engine, 4, 1), outcome(engine)]


def edit_in_place(engine: zeroxide.Engine) -> list:
    """At stages 0 to 2, where parameters always show their values."""
    params = dict(engine.module.named_parameters())
    train(engine, 0, 1)
    with torch.no_grad():
        params["first.weight"][1].mul_(2)
        params["mixed.weight"].add_(0.125)
    found = [outcome(engine)]
    params["mixed.weight"].data.mul_(0.5)
    found += [train(engine, 1, 1), outcome(engine)]
    return found


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize(("act", "stage"), [(read_and_set, 3), (edit, 3), (edit, 1), (edit_in_place, 2)])
@pytest.mark.parametrize("precision", ["split", "master-bf16", "fp32", "split-bf16", "compact"])
def test_values_are_read_and_changed_as_in_host_memory(act, stage, precision):
    """Catches: a change that the master weight does not take over, a gradient that is set and not measured anew, parts
    that are read from the core instead of the device."""
    found = {}
    for place in ("host", *ON_DEVICE):
        with engine_of(place, precision, zero_optimization={"stage": stage}) as engine:
            found[place] = act(engine)
    for place in ON_DEVICE:
        for number, expected in enumerate(found["host"]):
            assert same(found[place][number], expected), (place, number)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("saved_by", "resumed_by", "precision"),
    [
        ("none", "host", "split"),
        ("host", "none", "split"),
        ("half", "all", "split"),
        ("none", "cpu", "split"),
        ("none", "cpu", "compact"),
        ("host", "half", "compact"),
        ("half", "all", "split-bf16"),
    ],
)
def test_a_checkpoint_goes_on_wherever_state_is(saved_by, resumed_by, precision, background, tmp_path):
    """Catches: state that is saved while it is updated, fills that go to the wrong side, update counts left behind."""
    more = {"zeroxide": {"checkpoint_background": background}}
    with engine_of(saved_by, precision, **more) as engine:
        train(engine, 0, 2)
        engine.save_checkpoint(tmp_path)
        expected = train(engine, 2, 2), outcome(engine)
        engine.wait_for_checkpoint()
    with engine_of(resumed_by, precision, **more) as engine:
        train(engine, 7, 1)
        engine.load_checkpoint(tmp_path)
        got = train(engine, 2, 2), outcome(engine)
    assert got[0] == expected[0]
    assert differing(got[1], expected[1]) == []


def test_at_stage_2_the_model_keeps_its_weights():
    with engine_of("none", zero_optimization={"stage": 2}) as engine:
        train(engine, 0, 2)
        model, expected = engine.module, engine.module_state_dict()
    found = {name: value.cpu() for name, value in model.state_dict().items()}
    assert differing(found, {name: value.cpu() for name, value in expected.items()}) == []


def test_another_stream_finds_the_new_weights(sim):
    """Catches: a step whose new weights are known to its own stream alone."""

    def run(forgotten: tuple[int, ...]) -> tuple[list, list]:
        other = torch.Stream("sim")
        with engine_of("none", zero_optimization={"stage": 2}) as engine:
            x = batch(engine, 9)
            train(engine, 0, 1)
            sim.reset()
            for each in forgotten:
                sim.forget_wait(each)
            for _ in range(2):
                engine.backward(engine(x).float().square().mean())
                engine.step()
            with sim.stream(other), torch.no_grad():
                engine(x)
            other.synchronize()
            return sim.races(), sim.wait_list()

    races, waits = run(())
    assert races == []
    needed = [at for at, wait in enumerate(waits) if wait.needed and "the host" not in wait.text]
    assert needed
    races, _ = run(tuple(needed))
    assert races
    sim.reset()


def test_a_construction_that_fails_gives_the_weights_back(monkeypatch):
    """Catches: an undo that asks the core for weights that are on the device."""
    torch.manual_seed(0)
    model = Tied()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail(self) -> None:
        raise RuntimeError("on purpose")

    steps = [(name, fail if name == "guard" else act) for name, act in build.STEPS]
    monkeypatch.setattr(build, "STEPS", tuple(steps))
    config = {"zero_optimization": {"stage": 3}, "zeroxide": {"device": "sim"}, "optimizer": {"type": "AdamW"}}
    with pytest.raises(RuntimeError, match="on purpose"):
        zeroxide.initialize(model=model, config=config)
    assert differing(model.state_dict(), before) == []
    assert model(torch.zeros(1, 8)).shape == (1, 8)


def test_an_infinite_gradient_is_told_as_in_host_memory():
    found = {}
    for place in ("host", "none"):
        with engine_of(place, bf16={"enabled": True, "check_grad_overflow": False}) as engine:
            train(engine, 0, 1)
            param = engine.module.mixed.weight
            zeroxide.safe_set_full_grad(param, torch.full((8, 8), float("inf")))
            engine.step(), engine.step()
            found[place] = str(engine.get_global_grad_norm()), outcome(engine)
    assert found["none"][0] == found["host"][0]
    assert found["none"][1]["live mixed.weight"].isnan().all()


@pytest.mark.parametrize("precision", ["split", "split-bf16", "compact"])
def test_what_it_takes_is_what_was_planned(precision, sim):
    for place in ("none", "half", "host"):
        with engine_of(place, precision) as engine:
            train(engine, 0, 1)
            told = engine.device_memory()
            assert told.pop("limit") is None
            for bucket, usage in told.items():
                assert usage["current"] == usage["peak"] == usage["planned"], (place, bucket)
            assert (told["optimizer"]["planned"] > 0) == (place != "host")
            in_host = engine.memory()
            for bucket, planned in engine.plan().expected_peaks().items():
                assert in_host[bucket]["peak"] == planned, (place, bucket)
            assert (in_host["gradients"]["peak"] == 0) == (place == "none")
    with engine_of("cpu") as engine:
        assert engine.device_memory() == {}


def test_parts_of_blocks_are_read_and_written_as_in_host_memory():
    """Through the core's own calls. Catches: elements that are counted from the wrong block, a block that is written in
    part and takes another unit for its rest, codes beyond a parameter's end that do not stand for zero."""
    found = {}
    for place in ("host", "none"):
        model = torch.nn.Linear(10, 13)
        config = {"optimizer": {"type": "AdamW"}, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
        config["zero_optimization"] |= PLACES[place].get("offload_optimizer", {}) and {
            "offload_optimizer": PLACES[place]["offload_optimizer"]
        }
        config["zeroxide"] = {"device": "sim", "threads": 1, "format": "compact"}
        engine = zeroxide.initialize(model=model, config=config)[0]
        assert bool(engine.plan().units_on_device) == (place == "none")
        core, results = engine.parts.core(), []
        (unit,) = (at for at, each in enumerate(engine.plan().units) if any(p.name == "weight" for p in each.params))
        at = next(at for at, each in enumerate(engine.plan().units[unit].params) if each.name == "weight")

        def read(start: int, count: int, core=core, unit=unit, at=at) -> torch.Tensor:
            out = torch.full((count,), 7.0)
            core.read_param(unit, at, "exp_avg", start, spec(out))
            return out

        for start, count in ((0, 64), (64, 66), (128, 2), (0, 130)):
            core.write_param(unit, at, "exp_avg", start, spec(torch.linspace(-3, 2, count) * (1 + start)))
            results += [read(0, 130), read(63, 2), read(70, 9), read(129, 1)]
        for start, count in ((1, 63), (0, 63), (64, 65), (5, 1)):
            with pytest.raises(CoreError) as caught:
                core.write_param(unit, at, "exp_avg", start, spec(torch.ones(count)))
            results.append(str(caught.value).split(": ", 1)[1])
        core.write_param(unit, at, "exp_avg", 3, spec(torch.ones(0)))
        results.append(read(0, 130))
        engine.destroy()
        found[place] = results
    for number, (one, other) in enumerate(zip(found["none"], found["host"], strict=True)):
        assert same(one, other), number

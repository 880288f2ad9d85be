"""What scripts do with an engine on a device: its bytes, its memory, edits, checkpoints, mistakes."""

from __future__ import annotations

import copy
import json
import time

import pytest
import torch
from models import build, loss_of, tokens
from torch import nn

import zeroxide
from simulated import engines
from zeroxide.cli.training.job import run
from zeroxide.cli.training.options import TrainOptions
from zeroxide.device.transfers import BLOCK_BYTES
from zeroxide.errors import ConfigError, DeviceError, ModelError
from zeroxide.integrations.ownership import Ownership
from zeroxide.zero.gather.device_weights import memory_of

HOMES = {"resident": {"stage": 2}, "resident-3": {"stage": 3}, "transient": {"stage": 3, "offload_param": "cpu"}}


@pytest.fixture(autouse=True)
def followed(sim):
    sim.set_delay(0, 100, seed=5)
    with engines.followed():
        yield
    assert [str(each) for each in sim.races()] == []


def config_of(home: str, where: str = "sim", **more) -> dict:
    zero = {key: value if key == "stage" else {"device": value} for key, value in HOMES[home].items()}
    return {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zeroxide": {"device": where, "threads": 1},
    } | more


def started(home: str, where: str = "sim", family: str = "gpt", **more) -> zeroxide.Engine:
    return zeroxide.initialize(model=build(family), config=config_of(home, where, **more))[0]


def batch(seed: int, where: str = "sim") -> dict[str, torch.Tensor]:
    return {name: value.to(where) for name, value in tokens(torch.Generator().manual_seed(seed)).items()}


def step(engine: zeroxide.Engine, seed: int, where: str = "sim", given: dict | None = None) -> float:
    loss = loss_of(engine(**(batch(seed, where) if given is None else given)))
    engine.backward(loss)
    engine.step()
    return loss.item()


@pytest.mark.parametrize(("home", "up"), [("resident", 2), ("resident-3", 2), ("transient", 6)])
def test_bytes_that_a_step_moves(home, up, sim):
    """Down 2 a parameter, and up 2 once, or as often as weights come to the device: in a forward, a backward, and a
    forward for evaluation. Catches: a gradient that travels in fp32 or twice, weights that are copied unchanged."""
    torch.manual_seed(0)
    # Whole tiles and no tied weight, so that no byte is padding.
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    engine, *_ = zeroxide.initialize(model=model, config=config_of(home, bf16={"enabled": True}))
    parameters = 4 * 64 * 64
    x = torch.ones(2, 64, device="sim", dtype=torch.bfloat16, requires_grad=True)
    for number in range(3):
        sim.reset_bytes()
        engine.backward(engine(x).float().square().mean())
        engine.step()
        with torch.no_grad():
            engine(x)
        if number:
            moved = sim.usage()
            assert (moved.down, moved.up) == (2 * parameters, up * parameters)
    assert engine.device_traffic()["down"] == 3 * 2 * parameters
    engine.destroy()


def test_transient_weights_leave_the_device(sim):
    """Catches: memory of a released unit that is kept."""
    torch.manual_seed(0)
    width, layers = 128, 16
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    before = sim.usage().in_use
    engine, *_ = zeroxide.initialize(model=model, config=config_of("transient"))
    unit = width * width * 4
    x = torch.ones(2, width, device="sim")
    engine.backward(engine(x).mean())
    engine.step()
    sim.reset_peak_memory_stats()
    engine.backward(engine(x).mean())
    # One in use, one ahead, one that is going; two gradients, and activations.
    assert sim.usage().peak - before < 6 * unit
    engine.step()
    assert sim.usage().in_use - before < unit
    engine.destroy()


@pytest.mark.parametrize("home", ["resident-3", "transient"])
def test_a_step_goes_on_while_nobody_calls(home):
    """Catches: an update that stands still until the next forward asks for it."""
    engine = started(home)
    step(engine, 0)
    engine.finish_step()
    last = memory_of(engine.parts.units[-1])
    before = last.window.clone()
    step(engine, 1)
    deadline = time.monotonic() + 60
    while torch.equal(last.window, before):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    engine.destroy()


@pytest.mark.parametrize("home", HOMES)
def test_edits_count_as_in_host_memory(home):
    """Catches: a weight that was changed on the device and not in the core."""
    outcomes = []
    for where in ("sim", "cpu"):
        engine = started(home, where)
        losses = [step(engine, 0, where)]
        weight = engine.module.h[1].up.weight
        with zeroxide.zero.GatheredParameters([weight], modifier_rank=0):
            assert weight.device.type == where
            with torch.no_grad():
                weight.mul_(0.5)
        losses.append(step(engine, 1, where))
        if HOMES[home]["stage"] < 3:
            with torch.no_grad():
                weight.add_(0.25)
            losses.append(step(engine, 2, where))
            weight.data.sub_(0.125)
            losses.append(step(engine, 3, where))
            weight.data = weight.data * 2
            losses.append(step(engine, 4, where))
        zeroxide.safe_set_full_fp32_param(weight, torch.full(weight.ds_shape, 0.01, device=where))
        losses.append(step(engine, 5, where))
        outcomes.append((losses, {n: v.cpu().clone() for n, v in engine.module_state_dict().items()}))
        engine.destroy()
    (there, weights), (here, wanted) = outcomes
    assert there == here
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("home", HOMES)
def test_a_checkpoint_goes_on_elsewhere(home, tmp_path):
    """Catches: buffers or weights of the device that a save or a load leaves out."""
    engine = started(home, family="gpt")
    [step(engine, seed) for seed in range(2)]
    engine.save_checkpoint(tmp_path)
    engine.save_16bit_model(tmp_path / "model")
    expected = [step(engine, seed) for seed in (2, 3)]
    engine.destroy()
    for where in ("sim", "cpu"):
        engine = started(home, where)
        engine.load_checkpoint(tmp_path)
        assert [step(engine, seed, where) for seed in (2, 3)] == expected
        engine.destroy()


@pytest.mark.parametrize(
    ("home", "began", "trains", "ends"),
    [
        *((home, "cpu", trains, "cpu") for home in HOMES for trains in (True, False)),
        ("resident", "sim", True, "cpu"),
        ("resident", "sim", False, "sim"),
    ],
)
def test_a_module_comes_back_to_one_device(home, began, trains, ends):
    """Catches: buffers that stay on the device beside weights in host memory, or leave it where weights are kept on it,
    and values of theirs from before training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(began)
    mean = model[1].running_mean.cpu().normal_().clone()
    model[1].running_mean = mean.to(began, copy=True)
    owner = Ownership.of(model, trains=trains)
    config = config_of(home, bf16={"enabled": True})
    engine, *_ = zeroxide.initialize(model=model, config=config if trains else config | {"optimizer": None})
    owner.belongs_to(model, engine)
    assert model[1].running_mean.device.type == "sim"
    engine.train(trains)
    x = torch.randn(8, 3)
    outputs = engine(x.to("sim", torch.bfloat16))
    if trains:
        engine.backward(outputs.float().square().mean())
        engine.step()
        mean = model[1].running_mean.cpu().float()
    owner.give_back()
    assert {each.device.type for each in (*model.parameters(), *model.buffers())} == {ends}
    assert model[1].running_mean.cpu().equal(mean)
    model(x.to(ends))


def test_a_default_device_changes_nothing(tmp_path):
    """Catches: host memory of the engine's that torch makes on the default device of a script."""
    outcomes = []
    given = [batch(seed) for seed in range(3)]
    for default in ("cpu", "sim"):
        model = build("gpt")
        torch.set_default_device(default)
        try:
            engine, *_ = zeroxide.initialize(model=model, config=config_of("transient"))
            losses = [step(engine, seed, given=given[seed]) for seed in range(2)]
            engine.save_checkpoint(tmp_path)
            losses += [step(engine, 2, given=given[2])]
            engine.load_checkpoint(tmp_path)
            with zeroxide.zero.GatheredParameters(list(model.parameters())):
                outcomes.append((losses, [param.detach().cpu().clone() for param in model.parameters()]))
            zeroxide.safe_get_full_fp32_param(model.h[0].up.weight)
            engine.destroy()
        finally:
            torch.set_default_device(None)
    assert outcomes[0][0] == outcomes[1][0]
    assert all(map(torch.equal, outcomes[0][1], outcomes[1][1]))


def test_weights_stay_on_the_device_after_the_end():
    engine = started("resident")
    model = engine.module
    step(engine, 0)
    expected = {name: param.detach().clone() for name, param in model.named_parameters()}
    engine.destroy()
    assert {param.device.type for param in model.parameters()} == {"sim"}
    assert all(torch.equal(param, expected[name]) for name, param in model.named_parameters())
    loss_of(model(**batch(1))).backward()


def test_a_view_that_is_kept_shows_what_the_weight_is():
    """Catches: weights of before a step under a view that outlives it, and a view read while new ones arrive."""

    def losses(keep: bool) -> list[float]:
        engine, kept = started("transient"), []
        module = engine.module.h[1].up
        if keep:
            module.register_forward_hook(lambda module, args, output: kept.append(module.weight.detach()))
            # While the one before it runs, the module's weights are on their way.
            engine.module.h[1].mix.register_forward_hook(lambda *_: [float(view.sum()) for view in kept].clear())
        found = []
        for seed in range(3):
            found.append(step(engine, seed))
            with zeroxide.zero.GatheredParameters([module.weight]):
                assert all(torch.equal(view, module.weight) for view in kept)
        engine.destroy()
        return found

    assert losses(True) == losses(False)


def test_a_failed_pass_leaves_nothing_behind(sim):
    """Catches: hooks for saved tensors that stay in force, blocks that are never given back."""
    engine = started("transient")
    with pytest.raises(IndexError):
        engine(torch.full((1, 4), 1000, device="sim"))
    for _ in range(3):
        loss = loss_of(engine(**batch(0)))
        handle = engine.module.h[0].register_full_backward_hook(lambda *_: 1 / 0)
        again = loss_of(engine(**batch(0)))
        handle.remove()
        del loss
        with pytest.raises(ZeroDivisionError):
            engine.backward(again)
        engine.zero_grad()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    fresh = started("transient")
    assert step(engine, 1) == step(fresh, 1)
    engine.destroy()
    fresh.destroy()


def test_a_gradient_in_several_blocks_that_fails_on_its_way_leaves_nothing_behind():
    """Catches: a part of a gradient that stays in the core, and is taken for the beginning of the next one."""

    def losses(fail: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, (BLOCK_BYTES // 4 * 3 // 64) + 1, bias=False))
        engine, *_ = zeroxide.initialize(model=model, config=config_of("transient"))
        x = torch.ones(2, 64, device="sim")
        if fail:
            handle = model[0].register_full_backward_hook(lambda *_: 1 / 0)
            loss = engine(x).square().mean()
            handle.remove()
            with pytest.raises(ZeroDivisionError):
                engine.backward(loss)
            engine.zero_grad()
        found = []
        for _ in range(2):
            loss = engine(x).square().mean()
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
        engine.destroy()
        return found

    assert losses(True) == losses(False)


def test_hooks_for_saved_tensors_of_the_callers_see_activations():
    """Catches: hooks of the engine's in the place of the caller's, as of torch.autograd.graph.save_on_cpu."""
    seen = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tensor.shape))
        return tensor.detach().cpu()

    engine, fresh = started("transient"), started("transient")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.to("sim")):
        loss = loss_of(engine(**batch(0)))
    engine.backward(loss)
    engine.step()
    assert (2, 12, 144) in seen, "the activation between the two layers of a block"
    assert (144, 48) not in seen, "a weight of one of them"
    assert [loss.item(), step(engine, 1)] == [step(fresh, 0), step(fresh, 1)]
    engine.destroy()
    fresh.destroy()


def test_an_in_place_change_of_a_saved_tensor_is_refused():
    """torch does not look, where hooks for saved tensors are in force."""

    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            hidden = self.linear(x).tanh()
            out = hidden * 2
            hidden.add_(1)
            return out.sum()

    engine, *_ = zeroxide.initialize(model=Changes(), config=config_of("transient"))
    loss = engine(torch.ones(2, 4, device="sim"))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        engine.backward(loss)
    engine.destroy()


def test_autocast_on_the_device():
    """Catches: autocast that is asked for on another kind of device."""
    seen = []
    model = build("gpt")
    model.h[0].up.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    more = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    engine, *_ = zeroxide.initialize(model=model, config=config_of("resident", **more))
    engine(**batch(0))
    assert seen == [torch.bfloat16]
    engine.destroy()


def test_the_command_line_trains_a_model_from_the_meta_device_there(tmp_path):
    """Catches: batches, prompts and buffers in host memory, and a model on the meta device whose parameters stay there.

    Attention on the simulated device is composed of other operators than the host's: losses are close, not equal.
    """
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.py").write_text("".join(f"def f_{i}(a):\n    return a * {i}\n\n\n" for i in range(400)))
    losses = []
    for where in ("sim", "cpu"):

        def initialize(config, where=where, **given):
            return zeroxide.initialize(config={**config, "zeroxide": {**config["zeroxide"], "device": where}}, **given)

        options = TrainOptions(
            model="tiny",
            data=(str(tmp_path / "text"),),
            steps=4,
            batch_size=2,
            seq_len=32,
            dtype="fp32",
            threads=1,
            sample_tokens=3,
            eval_batches=1,
            out=str(tmp_path / where),
        )
        assert run(options, initialize=initialize) == 0
        lines = map(json.loads, (tmp_path / where / "log.jsonl").read_text().splitlines())
        losses.append([event["loss"] for event in lines if event["event"] == "step"])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_model_on_one_device_is_not_trained_on_another():
    model = nn.Linear(4, 4).to("sim:1")
    with pytest.raises(ModelError, match="weight is on sim:1, and the model is to compute on sim:0"):
        zeroxide.initialize(model=model, config=config_of("resident", "sim:0"))
    assert model.weight.device == torch.device("sim:1")
    engine, *_ = zeroxide.initialize(model=model, config=config_of("resident", "auto"))
    assert engine.device == torch.device("sim:1")
    engine.destroy()


def test_parameters_on_two_devices_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).to("sim"))
    with pytest.raises(ModelError, match="on two devices"):
        zeroxide.initialize(model=model, config=config_of("resident"))


@pytest.mark.parametrize(("asked", "said"), [("sim:7", "torch sees 2"), ("cuda", "torch sees 0"), ("warp", "warp")])
def test_a_device_that_is_not_there_is_refused(asked, said):
    with pytest.raises(ConfigError, match=f'zeroxide.device: there is no device "{asked}".*{said}'):
        started("resident", asked)


def test_a_captured_stream_is_refused(monkeypatch):
    """Only CUDA has graphs; whether one is captured is answered for it here."""
    engine = started("transient")
    monkeypatch.setattr("zeroxide.device.transfers.is_capturing", lambda device: device.type == "sim")
    with pytest.raises(DeviceError, match="a CUDA graph is being captured"):
        engine(**batch(0))
    monkeypatch.undo()
    step(engine, 0)
    engine.destroy()


def test_a_construction_that_fails_gives_the_model_back(sim):
    model = build("gpt")
    before = copy.deepcopy(model.state_dict())
    sim.set_memory_limit(1 << 16)
    try:
        with pytest.raises(DeviceError, match=r"has no room for \d+ bytes of weights of .*offload_param") as refused:
            zeroxide.initialize(model=model, config=config_of("resident"))
        assert (refused.value.device, refused.value.total) == (0, 1 << 16)
        assert refused.value.need > refused.value.free
    finally:
        sim.set_memory_limit(1 << 40)
    assert all(torch.equal(value.cpu(), before[name]) for name, value in model.state_dict().items())
    assert {param.device.type for param in model.parameters()} == {"cpu"}

"""Experts that no token goes to are neither read nor updated: beside plain PyTorch in float64."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from routed_models import EXPERTS, LAYERS, batches, build, config_for, train_plainly
from torch import nn

import zeroxide
from zeroxide.errors import ConfigError, ModelError
from zeroxide.moe import MoE

# 8 steps of fp32 AdamW beside float64. An element's update is at most about lr = 1e-2 and depends on m / sqrt(v), of
# relative error at most some 1e-5 after sums over 24 products; where a gradient nearly cancels, by more: 1e-4 of lr a
# step, 8 steps.
TOLERANCE = {"rtol": 0, "atol": 8e-6}
STEPS = 8


@contextmanager
def started(config: dict[str, Any], model: nn.Module | None = None):
    engine, *_ = zeroxide.initialize(model=build() if model is None else model, config=config)
    try:
        yield engine
    finally:
        engine.destroy()


def train(engine: Any, steps: list[list[torch.Tensor]]) -> list[float]:
    losses = []
    for each in steps:
        for ids in each:
            loss = engine(ids)
            engine.backward(loss)
            losses.append(loss.item())
            engine.step()
    return losses


def weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in engine.module_state_dict().items()}


def singly(number: int) -> list[list[torch.Tensor]]:
    return [[each] for each in batches(number)]


@pytest.mark.parametrize("home", ["nvme", "cpu", "state"])
def test_skipped_experts_are_those_without_a_gradient(tmp_path, home):
    """Catches: an expert without tokens that decays or whose moments do (its step counted), and one with tokens that is
    not updated, at every home."""
    plain, losses, _ = train_plainly(singly(STEPS), leave_out=True)
    with started(config_for(tmp_path, "skip", home)) as engine:
        assert train(engine, singly(STEPS)) == pytest.approx(losses, rel=1e-5)
        found = weights(engine)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(
            found[name].double(), value, **TOLERANCE, msg=lambda line, name=name: f"{name} {line}"
        )


def test_without_skipping_they_have_gradients_of_zeros(tmp_path):
    """The two oracles differ by far more than the tolerance: catches a test that could not fail."""
    plain, _, _ = train_plainly(singly(STEPS), leave_out=False)
    other, _, _ = train_plainly(singly(STEPS), leave_out=True)
    differ = [name for name, each in plain.state_dict().items() if (each - other.state_dict()[name]).abs().max() > 1e-4]
    assert any("experts" in name for name in differ)
    with started(config_for(tmp_path, "update")) as engine:
        train(engine, singly(STEPS))
        found = weights(engine)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(
            found[name].double(), value, **TOLERANCE, msg=lambda line, name=name: f"{name} {line}"
        )


def everything(engine: Any) -> dict[str, torch.Tensor]:
    """All weights, moments and counts of updates, as the optimizer's state dict and the model's have them."""
    found = weights(engine)
    state = engine.optimizer.state_dict()["state"]
    for number, each in state.items():
        found |= {f"{number}.{key}": torch.as_tensor(value).clone() for key, value in each.items()}
    return found


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("home", ["nvme", "cpu"])
@pytest.mark.parametrize(
    "kind", [{}, {"bf16": {"enabled": True}}, {"bf16": {"enabled": True}, "format": "compact"}], ids=str
)
def test_lazy_experts_have_the_bits_of_every_step(tmp_path, home, kind):
    """Beside every expert updated in every step, in host memory. Catches: a missed step that is left out, taken twice,
    in another order or with the constants of another (the learning rate changes), and random bits of another step."""
    found = []
    for mode, where in (("update", "cpu"), ("lazy", home)):
        own = {"format": kind["format"]} if "format" in kind else {}
        config = config_for(tmp_path, mode, where, **own) | {key: kind[key] for key in kind if key != "format"}
        config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-4, "warmup_max_lr": 2e-2}}
        with started(config) as engine:
            losses = train(engine, singly(STEPS))
            found.append((losses, everything(engine)))
    assert found[1][0] == found[0][0]
    assert_same_bits(found[1][1], found[0][1])


@pytest.mark.parametrize("rule", ["Lion", "SGD", "Adagrad"])
def test_lazy_experts_have_the_bits_of_every_step_of_any_rule(tmp_path, rule):
    """Catches: a rule whose step with a gradient of zeros is not taken, or is taken with what another rule keeps."""
    found = []
    for mode, home in (("update", "cpu"), ("lazy", "nvme")):
        config = config_for(tmp_path, mode, home)
        config["optimizer"] = {"type": rule, "params": {"lr": 1e-2, "weight_decay": 0.1}}
        if rule == "SGD":
            config["optimizer"]["params"]["momentum"] = 0.9
        with started(config) as engine:
            train(engine, singly(STEPS))
            found.append(everything(engine))
    assert_same_bits(found[1], found[0])


def test_lazy_experts_are_plain_adamw_with_gradients_of_zeros(tmp_path):
    plain, losses, _ = train_plainly(singly(STEPS), leave_out=False)
    with started(config_for(tmp_path, "lazy")) as engine:
        assert train(engine, singly(STEPS)) == pytest.approx(losses, rel=1e-5)
        found = weights(engine)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(
            found[name].double(), value, **TOLERANCE, msg=lambda line, name=name: f"{name} {line}"
        )


@pytest.mark.parametrize("mode", ["skip", "lazy"])
def test_only_experts_with_tokens_are_read_and_written(tmp_path, mode):
    """Of each step, the units that the disk has read or written are those that plain PyTorch had tokens for, and what
    is no expert. Catches: a unit that is brought because the last pass used it, a state that is read for a gradient of
    zero, and a missed step that is made up for before anybody needs it."""
    steps = singly(6)
    _, _, used = train_plainly(steps, leave_out=True)
    assert len(set(map(frozenset, used))) > 3, "routes differ from step to step"
    with started(config_for(tmp_path, mode)) as engine:
        names = {unit.name for unit in engine.plan().units}
        for step, having in zip(steps, used, strict=True):
            path = tmp_path / "trace.json"
            with engine.trace(path):
                train(engine, [step])
                engine.finish_step()
            events = json.loads(path.read_text())["traceEvents"]
            moved = {each["args"]["unit"] for each in events if each["ph"] == "X" and each["name"] in ("read", "write")}
            experts = {
                f"layers.{layer}.moe.deepspeed_moe.experts.deepspeed_experts.{number}" for layer, number in having
            }
            assert experts < names
            assert {name for name in moved if ".deepspeed_experts." in name} == experts


def test_experts_are_units_of_their_own_only_where_they_are_left_out(tmp_path):
    for mode, number in (("update", 1 + LAYERS), ("skip", 1 + LAYERS * (1 + EXPERTS))):
        with started(config_for(tmp_path, mode)) as engine:
            assert len(engine.plan().units) == number


ACCUMULATED = [batches(3, seed) for seed in range(4)]


def accumulating(config: dict[str, Any], clip: float) -> dict[str, Any]:
    return {**config, "gradient_accumulation_steps": 3, "gradient_clipping": clip}


@pytest.mark.parametrize("gradients", ["host", "disk"])
@pytest.mark.parametrize("mode", ["skip", "lazy"])
def test_micro_batches_with_routes_of_their_own(tmp_path, mode, gradients):
    """With clipping, beside plain PyTorch, gradients in memory or on disk. Catches: an expert that only a later
    micro-batch uses and that is not caught up, gradients of one that are dropped when another is caught up, and a norm
    that lacks or repeats an expert's."""
    clip = 0.4
    plain, losses, used = train_plainly(ACCUMULATED, leave_out=mode == "skip", clip=clip)
    assert all(len(each) < LAYERS * EXPERTS for each in used)
    config = accumulating(config_for(tmp_path, mode, gradients=gradients), clip)
    with started(config) as engine:
        assert train(engine, ACCUMULATED) == pytest.approx(losses, rel=1e-5)
        assert engine.get_global_grad_norm() > clip
        found = weights(engine)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(
            found[name].double(), value, **TOLERANCE, msg=lambda line, name=name: f"{name} {line}"
        )


@pytest.mark.parametrize("mode", ["skip", "lazy"])
def test_a_recomputed_layer_uses_the_same_experts(tmp_path, mode):
    """Bits of what is kept for backward. Catches: an expert that recomputation leaves out, or releases too early."""
    found = []
    for recomputes in (False, True):
        with started(config_for(tmp_path, mode), build(recomputes)) as engine:
            losses = train(engine, singly(STEPS))
            found.append((losses, everything(engine)))
    assert found[1][0] == found[0][0]
    assert_same_bits(found[1][1], found[0][1])


def test_an_evaluation_finds_what_every_step_has_made(tmp_path):
    """Between steps, with tokens of other experts than were trained. Catches: weights that evaluation reads before
    they are caught up, and steps that are made up for twice, by an evaluation and by the training after it."""
    found = []
    others = torch.arange(12).view(1, -1)
    for mode, home in (("update", "cpu"), ("lazy", "nvme")):
        with started(config_for(tmp_path, mode, home)) as engine:
            losses = []
            for each in singly(STEPS):
                losses += train(engine, [each])
                engine.eval()
                with torch.no_grad():
                    losses.append(engine(others).item())
                engine.train()
            found.append((losses, everything(engine)))
    assert found[1][0] == found[0][0]
    assert_same_bits(found[1][1], found[0][1])


def test_what_scripts_ask_of_an_expert_is_caught_up(tmp_path):
    """Full and local values, the state, edits and gradients of experts that have missed steps, each asked first, and a
    view in a gathered parameter. Catches: a reader that finds the value of an earlier step, an edit that later steps
    come on top of, and a gradient that is taken for the steps before it."""
    found = []
    for mode, home in (("update", "cpu"), ("lazy", "nvme")):
        with started(config_for(tmp_path, mode, home)) as engine:
            train(engine, singly(3))
            params = [param for name, param in engine.module.named_parameters() if name.endswith("0.weight")]
            read = [
                *(zeroxide.zero.safe_get_full_fp32_param(param) for param in params[0::6]),
                *(zeroxide.zero.safe_get_full_optimizer_state(param, "exp_avg") for param in params[1::6]),
                *(zeroxide.zero.safe_get_local_optimizer_state(param, "exp_avg_sq") for param in params[2::6]),
            ]
            for param in params[3::6]:
                zeroxide.zero.safe_set_full_fp32_param(param, torch.ones(param.ds_shape))
            for param in params[4::6]:
                with zeroxide.zero.GatheredParameters([param]):
                    read.append(param.detach().clone())
            for param in params[5::6]:
                zeroxide.zero.safe_set_full_optimizer_state(param, torch.ones(param.ds_shape), "exp_avg")
            train(engine, singly(3))
            engine.backward(engine(batches(1)[0]))
            for param in params[0::6]:
                zeroxide.zero.safe_set_full_grad(param, torch.full(param.ds_shape, 0.01))
            engine.step()
            found.append((dict(enumerate(read)), everything(engine)))
    for number in (0, 1):
        assert_same_bits(found[1][number], found[0][number])


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_has_every_step(tmp_path, background):
    """Saved lazy and in the middle, it goes on in either mode with the bits of a run that was never saved. Catches:
    values or counts of updates that are saved before they are caught up, and steps of the run before that a load
    leaves to be made up for."""
    steps = singly(6)
    with started(config_for(tmp_path / "a", "update", "cpu")) as engine:
        train(engine, steps)
        expected = everything(engine)
    with started(config_for(tmp_path / "b", "lazy", checkpoint_background=background)) as engine:
        train(engine, steps[:3])
        engine.save_checkpoint(str(tmp_path / "saved"))
        train(engine, singly(2))
    for mode in ("update", "lazy"):
        with started(config_for(tmp_path / "c", mode)) as engine:
            train(engine, singly(2))
            engine.load_checkpoint(str(tmp_path / "saved"))
            train(engine, steps[3:])
            assert_same_bits(everything(engine), expected)


@pytest.mark.slow
def test_steps_are_remembered_up_to_a_number(tmp_path):
    """More than 256 steps without a use. Catches: a memory that grows without bound, and a step that falls out of it
    without having been made up for."""
    found = []
    for mode, home in (("update", "cpu"), ("lazy", "nvme")):
        config = config_for(tmp_path, mode, home)
        config["optimizer"]["params"] |= {"lr": 1e-4}
        with started(config) as engine:
            tiles = [engine.io()["tiles_updated"]]
            for _ in range(260):
                train(engine, [batches(1)])
                engine.finish_step()
                tiles.append(engine.io()["tiles_updated"])
            train(engine, singly(2))
            found.append(everything(engine))
    each_step = [after - before for before, after in itertools.pairwise(tiles)]
    # Two of the experts of each layer have tokens, and those of the others that never had any were never updated.
    assert max(each_step) >= each_step[0] + LAYERS * (EXPERTS - 2) / 2
    assert each_step.index(max(each_step)) == 256
    assert_same_bits(found[1], found[0])


def test_no_expert_has_tokens(tmp_path):
    """An empty micro-batch. Catches: a layer that makes nothing of no rows."""
    model = build()
    for module in model.modules():
        if hasattr(module, "routing"):
            module.routing = Nobody()
    layer = model.layers[0].moe
    output, _, _ = layer(torch.zeros(0, 16))
    assert output.shape == (0, 16)


class Nobody:
    def used(self, counts: list[int]) -> list[bool]:
        return [False] * len(counts)


REFUSED = {
    "no experts": (lambda config: None, nn.Linear(4, 4), ModelError, "has no zeroxide.moe.MoE layer"),
    "stage": (lambda config: config.update(zero_optimization={"stage": 2}), None, ConfigError, "stage 2 shows weights"),
    "layers": (
        lambda config: config["zeroxide"].update(accumulation_order="layers"), None, ConfigError, "accumulation_order",
    ),
    "durable": (lambda config: config["zeroxide"].update(durable_every=1), None, ConfigError, "durable run"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_with_it_is_refused_by_name(tmp_path, name):
    change, model, error, words = REFUSED[name]
    config = config_for(tmp_path, "lazy")
    change(config)
    with pytest.raises(error, match=rf"zeroxide\.unrouted_experts: .*{words}"), started(config, model):
        pass


def test_an_expert_below_a_leaf_module_is_refused(tmp_path):
    model = build()
    zeroxide.zero.set_z3_leaf_module(model.layers[0], True)
    with pytest.raises(ModelError, match=r"zeroxide\.unrouted_experts: layers\.0.*below a leaf module"):
        zeroxide.initialize(model=model, config=config_for(tmp_path, "skip"))


def test_fused_experts_are_refused(tmp_path):
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 6))
            self.down_proj = nn.Parameter(torch.zeros(4, 6, 4))

    with pytest.raises(ModelError, match=r"zeroxide\.unrouted_experts: 0, Fused, has all its experts in one parameter"):
        zeroxide.initialize(model=nn.Sequential(Fused()), config=config_for(tmp_path, "skip"))


def test_all_experts_run_when_an_engine_has_ended(tmp_path):
    model = build()
    with started(config_for(tmp_path, "skip"), model):
        assert model.layers[0].moe.deepspeed_moe.experts.routing is not None
    assert model.layers[0].moe.deepspeed_moe.experts.routing is None


def test_a_copy_of_a_layer_runs_all_its_experts(tmp_path):
    """Catches: a copy or a file that takes the ranks of an engine along."""
    with started(config_for(tmp_path, "skip", "state")) as engine:
        experts = engine.module.layers[0].moe.deepspeed_moe.experts
        assert experts.routing is not None
        assert copy.copy(experts.routing) is None
        assert pickle.loads(pickle.dumps(experts.routing)) is None


def test_a_durable_run_goes_on_with_experts_left_out(tmp_path):
    """Catches: a commit that lacks experts which its steps have not written."""
    steps = singly(6)
    with started(config_for(tmp_path / "a", "skip")) as engine:
        train(engine, steps)
        expected = everything(engine)
    config = config_for(tmp_path / "b", "skip", durable_every=2)
    with started(config) as engine:
        train(engine, steps[:4])
    with started(config) as engine:
        assert engine.resume() == 4
        train(engine, steps[4:])
        assert_same_bits(everything(engine), expected)


def test_very_many_small_experts_stay_units_of_their_own(tmp_path):
    """Catches: experts that share a unit because there are many, and are all brought for one of them."""
    model = nn.Sequential(*(MoE(4, nn.Linear(4, 4), 70, k=2) for _ in range(2)))
    with started(config_for(tmp_path, "skip", "cpu"), model) as engine:
        assert sum(".deepspeed_experts." in unit.name for unit in engine.plan().units) == 140

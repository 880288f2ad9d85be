"""Lion, Adagrad and SGD through the config, through torch's objects and in a plain loop, and groups that differ."""

import inspect
import json
import re

import pytest
import torch
from plain_rules import Given, gradient, lion, of_torch

import zeroxide
from zeroxide import optim
from zeroxide.config import RULES
from zeroxide.errors import CheckpointError, ConfigError, ModelError
from zeroxide.optim.rules import states

STEPS = 5
LION = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
ADAGRAD = {"lr": 0.05, "lr_decay": 0.01, "weight_decay": 0.01, "initial_accumulator_value": 0.25, "eps": 1e-10}
SGD = {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01, "nesterov": False}
NESTEROV = {"lr": 0.01, "momentum": 0.8, "dampening": 0.0, "weight_decay": 0.0, "nesterov": True}
PLAIN = {"lr": 0.01, "momentum": 0.0, "dampening": 0.5, "weight_decay": 0.01, "nesterov": False}
CASES = {
    "Lion": ("Lion", LION),
    "Adagrad": ("Adagrad", ADAGRAD),
    "SGD": ("SGD", SGD),
    "SGD, Nesterov": ("SGD", NESTEROV),
    "SGD without momentum": ("SGD", PLAIN),
}
"""What every test of all rules runs: a further rule is a line here, whose oracle is torch's class of that name."""
OF_TORCH = [case for case, (kind, _) in CASES.items() if hasattr(torch.optim, kind)]
NAMES = {kind: states(rule) for rule in RULES.values() for kind in rule.types}


def expected(kind, hyperparameters, weight, gradients):
    """By the formula, or by torch, in double precision."""
    if kind == "Lion":
        return lion(weight, gradients, **hyperparameters)
    return of_torch(getattr(torch.optim, kind), weight, gradients, **hyperparameters)


def gradients_of(layer, position, numel, steps=STEPS):
    return [gradient(layer, position, at, numel) for at in range(steps)]


def make(model, config, tmp_path, *, dtype="bf16", offload="none", **more):
    home = f"nvme:{tmp_path / 'scratch'}" if offload == "nvme" else offload
    base = {"zeroxide": {"threads": 2}, "gradient_clipping": 0}
    return zeroxide.initialize(model=model, config={**base, **config}, dtype=dtype, offload=home, **more)[0]


def train(engine, first=0, last=STEPS):
    for at in range(first, last):
        engine.backward(engine(at))
        engine.step()


def check(engine, rules):
    """Every weight and state tensor against `rules`, the (kind, hyperparameters) of each name."""
    start = Given()
    for number, (layer, was) in enumerate(zip(engine.module.layers, start.layers, strict=True)):
        for position, name in enumerate(start.names):
            kind, hyperparameters = rules[name]
            gradients = gradients_of(number, position, was[name].numel())
            weight, state, error = expected(kind, hyperparameters, was[name].detach(), gradients)
            found = zeroxide.safe_get_full_fp32_param(layer[name]).double()
            assert ((found - weight).abs() <= error).all(), (kind, name)
            for key, value in state.items():
                moment = zeroxide.safe_get_full_optimizer_state(layer[name], key).double()
                # Eight roundings a step, of terms that do not cancel.
                assert ((moment - value).abs() <= 8 * STEPS * 2.0**-24 * value.abs()).all(), (kind, name, key)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "offload"), [("fp32", "none"), ("bf16", "none"), ("bf16", "nvme"), ("fp16", "cpu")])
def test_a_config_names_the_rule(case, dtype, offload, tmp_path):
    kind, hyperparameters = CASES[case]
    fp16 = {"fp16": {"enabled": True, "loss_scale": 1024.0}} if dtype == "fp16" else {}
    config = {"optimizer": {"type": kind, "params": hyperparameters}, **fp16}
    engine = make(Given(), config, tmp_path, dtype=dtype, offload=offload)
    train(engine)
    check(engine, dict.fromkeys(("first", "second", "third"), (kind, hyperparameters)))
    engine.destroy()


def groups_of(model, **rules):
    return [
        {"params": [layer[name] for layer in model.layers], "optimizer": kind, "state_format": fmt, **hyperparameters}
        for name, (kind, hyperparameters, fmt) in rules.items()
    ]


MIXED = {
    "first": ("Lion", LION, "fp32"),
    "second": ("Adagrad", ADAGRAD, "split"),
    "third": ("sgd", SGD, "fp32"),
}
WANTED = {"first": ("Lion", LION), "second": ("Adagrad", ADAGRAD), "third": ("SGD", SGD)}


@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
def test_groups_have_rules_and_formats_of_their_own(offload, tmp_path):
    model = Given()
    engine = make(model, {}, tmp_path, offload=offload, lr=1e-3, model_parameters=groups_of(model, **MIXED))
    assert [group["optimizer"] for group in engine.optimizer.param_groups] == ["lion", "adagrad", "sgd"]
    plan = {(unit.state.rule, unit.state.format) for unit in engine.parts.plan.units}
    assert plan == {("lion", "fp32"), ("adagrad", "split"), ("sgd", "fp32")}
    train(engine)
    check(engine, WANTED)
    for name, key in (("first", "exp_avg"), ("second", "sum"), ("third", "momentum_buffer")):
        state = engine.optimizer.state[model.layers[0][name]]
        assert list(state) == ["step", key, "master"]
        assert state["step"] == STEPS
        with pytest.raises(ConfigError, match=rf'expected "{key}", which the optimizer of layers.0.{name} has'):
            zeroxide.safe_get_full_optimizer_state(model.layers[0][name], "exp_avg_sq")
    engine.destroy()


def test_a_group_of_another_rule_has_the_defaults_of_that_rule(tmp_path):
    model = Given()
    groups = [{"params": list(model.parameters()), "optimizer": "SGD", "weight_decay": 0.5}]
    engine = make(model, {}, tmp_path, lr=0.5, betas=(0.5, 0.5), model_parameters=groups)
    found = {key: value for key, value in engine.optimizer.param_groups[0].items() if key != "params"}
    defaults = {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "nesterov": False}
    assert found == {"optimizer": "sgd", "weight_decay": 0.5, **defaults}
    engine.destroy()


def test_a_checkpoint_has_the_state_by_name(tmp_path):
    model = Given()
    engine = make(model, {}, tmp_path, offload="nvme", lr=1e-3, model_parameters=groups_of(model, **MIXED))
    train(engine, 0, 2)
    engine.save_checkpoint(tmp_path / "saved", tag="two")
    manifest = json.loads((tmp_path / "saved" / "two" / "manifest.json").read_text())
    states = {each["names"][0]: list(each["state"]) for each in manifest["parameters"]}
    assert states["layers.1.first"] == ["exp_avg"]
    assert states["layers.1.second"] == ["sum"]
    assert states["layers.1.third"] == ["momentum_buffer"]
    train(engine, 2, STEPS)
    check(engine, WANTED)
    engine.destroy()
    model = Given()
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    # Another format holds the same state.
    other = {"split": "fp32", "fp32": "split"}
    swapped = {name: (kind, numbers, other[fmt]) for name, (kind, numbers, fmt) in MIXED.items()}
    again = make(model, {}, tmp_path, lr=1e-3, model_parameters=groups_of(model, **swapped))
    again.load_checkpoint(tmp_path / "saved")
    train(again, 2, STEPS)
    check(again, WANTED)
    again.destroy()


def test_a_checkpoint_of_another_rule_is_refused(tmp_path):
    engine = make(Given(), {"optimizer": {"type": "Lion", "params": LION}}, tmp_path)
    train(engine, 0, 1)
    engine.save_checkpoint(tmp_path / "saved")
    engine.destroy()
    other = make(Given(), {"optimizer": {"type": "SGD", "params": SGD}}, tmp_path)
    with pytest.raises(CheckpointError, match=r"with the optimizer lion in group 0, this engine has sgd: use the same"):
        other.load_checkpoint(tmp_path / "saved")
    other.load_checkpoint(tmp_path / "saved", load_optimizer_states=False)
    other.destroy()


def test_a_parameter_that_was_frozen_starts_from_the_initial_value(tmp_path):
    config = {"optimizer": {"type": "Adagrad", "params": ADAGRAD}}
    model = Given()
    model.layers[0]["first"].requires_grad_(False)
    engine = make(model, config, tmp_path)
    train(engine, 0, 2)
    engine.save_checkpoint(tmp_path / "saved")
    engine.destroy()
    model = Given()
    again = make(model, config, tmp_path, offload="nvme")
    train(again, 0, 1)
    again.load_checkpoint(tmp_path / "saved")
    assert (zeroxide.safe_get_full_optimizer_state(model.layers[0]["first"], "sum") == 0.25).all()
    assert (zeroxide.safe_get_full_optimizer_state(model.layers[1]["first"], "sum") > 0.25).all()
    again.destroy()


@pytest.mark.parametrize("case", OF_TORCH)
def test_torchs_optimizers_are_taken_over(case, tmp_path):
    kind, hyperparameters = CASES[case]
    model = Given()
    optimizer = getattr(torch.optim, kind)(model.parameters(), **hyperparameters)
    engine = make(model, {}, tmp_path, optimizer=optimizer)
    assert engine.optimizer.param_groups[0] is optimizer.param_groups[0]
    train(engine)
    check(engine, dict.fromkeys(("first", "second", "third"), (kind, hyperparameters)))
    engine.destroy()


@pytest.mark.parametrize("case", OF_TORCH)
def test_state_dicts_of_torch_are_read(case, tmp_path):
    """A torch optimizer makes the first steps, the engine the others: as if one had made all."""
    kind, hyperparameters = CASES[case]
    model = Given()
    optimizer = getattr(torch.optim, kind)(model.parameters(), **hyperparameters)
    for at in range(2):
        optimizer.zero_grad()
        model(at).backward()
        optimizer.step()
    engine = make(model, {"optimizer": {"type": kind, "params": hyperparameters}}, tmp_path, dtype="fp32")
    engine.optimizer.load_state_dict(optimizer.state_dict())
    train(engine, 2)
    check(engine, dict.fromkeys(("first", "second", "third"), (kind, hyperparameters)))
    adam = torch.optim.Adam(Given().parameters())
    with pytest.raises(ConfigError, match=rf"load_state_dict: group 0 has no \w+: expected that of {kind}"):
        engine.optimizer.load_state_dict(adam.state_dict())
    engine.destroy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offload", ["none", "nvme"])
@pytest.mark.parametrize("case", CASES)
def test_a_plain_loop(case, offload, dtype, tmp_path):
    kind, hyperparameters = CASES[case]
    model = Given().to(dtype)
    starts = [param.detach().float().clone() for param in model.parameters()]
    home = f"nvme:{tmp_path}" if offload == "nvme" else "none"
    optimizer = getattr(optim, kind)(model.named_parameters(), **hyperparameters, offload=home)
    for at in range(STEPS):
        optimizer.zero_grad()
        model(at).backward()
        optimizer.step()
    for number, layer in enumerate(model.layers):
        for position, name in enumerate(model.names):
            gradients = gradients_of(number, position, layer[name].numel())
            at = number * len(model.names) + position
            weight, state, error = expected(kind, hyperparameters, starts[at], gradients)
            own = optimizer.state[layer[name]]
            found = (own["master"] if dtype is torch.bfloat16 else layer[name].detach()).double()
            assert ((found - weight).abs() <= error).all(), name
            assert set(own) == {"step", *NAMES[kind]} | ({"master"} if dtype is torch.bfloat16 else set())
            for key, value in state.items():
                assert ((own[key].double() - value).abs() <= 8 * STEPS * 2.0**-24 * value.abs()).all(), key
    packed = optimizer.state_dict()
    optimizer.close()
    again = getattr(optim, kind)(model.named_parameters(), **hyperparameters)
    again.load_state_dict(packed)
    assert torch.equal(again.state_dict()["state"][0][NAMES[kind][0]], packed["state"][0][NAMES[kind][0]])
    again.close()


PLACEMENT = ["offload='none'", "format='split'", "host_memory=None", "threads=None"]
ARGUMENTS = {
    "AdamW": ["params", "lr=0.001", "betas=(0.9, 0.999)", "eps=1e-08", "weight_decay=0.01", *PLACEMENT],
    "Lion": ["params", "lr=0.0001", "betas=(0.9, 0.99)", "weight_decay=0.0", *PLACEMENT],
    "Adagrad": [
        *("params", "lr=0.01", "lr_decay=0.0", "weight_decay=0.0", "initial_accumulator_value=0.0", "eps=1e-10"),
        *PLACEMENT,
    ],
    "SGD": [
        *("params", "lr=0.001", "momentum=0.0", "dampening=0.0", "weight_decay=0.0", "nesterov=False"),
        *PLACEMENT,
    ],
    "DeepSpeedCPUAdam": [
        *("model_params", "lr=0.001", "bias_correction=True", "betas=(0.9, 0.999)", "eps=1e-08", "weight_decay=0.0"),
        *("amsgrad=False", "adamw_mode=True", "fp32_optimizer_states=True"),
    ],
    "DeepSpeedCPULion": [
        *("model_params", "lr=0.001", "betas=(0.9, 0.999)", "weight_decay=0.0", "fp32_optimizer_states=True"),
    ],
    "DeepSpeedCPUAdagrad": [
        *("model_params", "lr=0.01", "eps=1e-10", "weight_decay=0.0", "amsgrad=False", "fp32_optimizer_states=True"),
    ],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_arguments_of_a_plain_loops_optimizer(name):
    """In their order, with their defaults, each explained, and taken by position and by name."""
    made = getattr(optim, name)
    parameters = inspect.signature(made).parameters.values()
    shown = [each.name + ("" if each.default is each.empty else f"={each.default!r}") for each in parameters]
    assert shown == ARGUMENTS[name]
    assert {each.name for each in parameters if each.kind is each.KEYWORD_ONLY} == (
        {"offload", "format", "host_memory", "threads"} if "offload='none'" in shown else set()
    )
    explained = (each for each in parameters if each.kind is not each.KEYWORD_ONLY and each.default is not each.empty)
    assert [each.name for each in explained if each.name not in made.__doc__ and "fp32" not in each.name] == []
    weight = torch.nn.Parameter(torch.ones(8))
    optimizer = made([weight], 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["params"][0] is weight
    optimizer.close()
    first = shown[0]
    with pytest.raises(TypeError, match=rf"^{name}\.__init__\(\) got an unexpected keyword argument 'rate'$"):
        made(**{first: [weight]}, rate=1.0)
    with pytest.raises(TypeError, match=rf"^{name}\.__init__\(\) missing a required argument: '{first}'$"):
        made()


def test_the_weight_decay_that_deepspeeds_adam_is_asked_for():
    weight = torch.nn.Parameter(torch.ones(8))
    for coupled in (True, False):
        optimizer = optim.DeepSpeedCPUAdam([weight], adamw_mode=not coupled, bias_correction=coupled)
        group = optimizer.param_groups[0]
        assert (group["decoupled"], group["bias_correction"]) == (not coupled, coupled)
        assert "adamw_mode" not in group
        optimizer.close()


def test_the_names_of_deepspeed():
    """Defaults as in DeepSpeed's constructors, whose parameters come first and by the name `model_params`."""
    weight = torch.nn.Parameter(torch.ones(8))
    for kind, wanted in (
        (
            optim.DeepSpeedCPUAdam,
            {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        ),
        (optim.DeepSpeedCPULion, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0}),
        (optim.DeepSpeedCPUAdagrad, {"lr": 1e-2, "eps": 1e-10, "weight_decay": 0.0}),
    ):
        made = kind(model_params=[weight])
        assert {key: made.param_groups[0][key] for key in wanted} == wanted
        weight.grad = torch.ones(8)
        made.step()
        assert (weight < 1).all()
        made.close()
        weight.data.fill_(1)
        with pytest.raises(ConfigError, match="fp32_optimizer_states=False is not supported"):
            kind([weight], fp32_optimizer_states=False)
    with pytest.raises(ConfigError, match="amsgrad=True is not supported"):
        optim.DeepSpeedCPUAdagrad([weight], amsgrad=True)


def test_what_cannot_be_combined_is_refused(tmp_path):
    def refused(line, *, dtype="bf16", **group):
        model = Given()
        groups = [{"params": list(model.parameters()), "optimizer": "Lion", **group}]
        with pytest.raises(ConfigError, match=re.escape(line)) as caught:
            make(model, {}, tmp_path, dtype=dtype, lr=1e-3, model_parameters=groups)
        assert "\n" not in str(caught.value)

    refused(f"optimizer group 0: optimizer is 'Lyon', expected one of {', '.join(RULES)}", optimizer="Lyon")
    refused(
        "optimizer group 0: state_format is 'bf16', expected one of split, fp32, split-bf16, compact",
        state_format="bf16",
    )
    halves = 'optimizer group 0: state_format "split" keeps a weight as two bf16 halves and needs bf16.enabled, got '
    refused(f'{halves}fp32 training; use "fp32"', dtype="fp32", state_format="split")
    refused("optimizer group 0: beta2 is 1.0, expected a number in [0, 1)", betas=(0.9, 1.0))
    refused("optimizer group 0 has a hyperparameter that is no number", lr="fast")
    sgd = "optimizer group 0: momentum is 0.0, expected a number above 0 with nesterov"
    refused(sgd, optimizer="SGD", nesterov=True)
    with pytest.raises(ConfigError, match=r"group 1 asks for 'lion', and this optimizer is adam: make one optimizer"):
        optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(2))]}, {"params": [], "optimizer": "lion"}])


def test_a_group_keeps_what_its_state_was_placed_by(tmp_path):
    model = Given()
    engine = make(model, {}, tmp_path, lr=1e-3, model_parameters=groups_of(model, **MIXED))
    train(engine, 0, 1)
    engine.backward(engine(1))
    engine.optimizer.param_groups[0]["optimizer"] = "adagrad"
    with pytest.raises(ConfigError, match="group 0: optimizer is now 'adagrad' and was 'lion' at initialize"):
        engine.step()
    engine.optimizer.param_groups[0]["optimizer"] = "lion"
    engine.optimizer.param_groups[0]["lr"] = 2e-3
    engine.step()
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(ModelError, match="belongs to no engine"):
        zeroxide.safe_set_full_optimizer_state(frozen, torch.ones(2), "exp_avg")
    engine.destroy()

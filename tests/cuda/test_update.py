"""Optimizer steps on a device: the bits of the CPU kernels whatever the hyperparameters, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from emulated import CUDA, Emulator, same_bits

from zeroxide import _core
from zeroxide.errors import InvalidValueError, TensorError
from zeroxide.kernels.core_update import reference
from zeroxide.kernels.update import Step, state_tensors, update

OPTIONS = {
    "adam": [
        {},
        {"weight_decay": 0.0},
        {"decoupled": False, "weight_decay": 0.3},
        {"decoupled": False, "weight_decay": 0.0},
        {"bias_correction": False, "eps": 0.0},
        {"beta1": 0.0, "beta2": 0.0, "lr": 10.0},
        {"lr": 0.0},
    ],
    "lion": [{}, {"beta1": 0.0, "weight_decay": 1.0}, {"beta1": 0.95, "beta2": 0.98}],
    "adagrad": [{}, {"lr_decay": 0.7, "weight_decay": 0.3}, {"eps": 0.0}],
    "sgd": [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.9, "nesterov": True},
            {"dampening": 0.5, "weight_decay": 0.3}],
}  # fmt: skip


@pytest.mark.parametrize("rule", OPTIONS)
def test_every_hyperparameter_has_the_bits_of_the_cpu_kernels(libraries, rule):
    """Three steps each, the first among them. Catches: a constant that is prepared or rounded another way."""
    for given in OPTIONS[rule]:
        hyperparameters = {**_core.RULES[rule].hyperparameters, **given}
        generator = torch.Generator().manual_seed(5)
        formats = (("fp32", torch.float32), *((each, torch.bfloat16) for each in ("split", "split-bf16", "compact")))
        for format, dtype in formats:
            names = state_tensors(Step(rule, hyperparameters), format, dtype)
            state = [torch.zeros(each.numel(301), dtype=each.dtype) for each in names]
            state[0] = torch.randn(301, generator=generator).to(dtype)
            for number, scale in ((1, 1.0), (2, 1 / 3), (1000, 2.0**-16)):
                step = Step(rule, hyperparameters, number, scale)
                grad = torch.randn(301, generator=generator)
                expected = reference(step, format, state, grad)
                update(Emulator(libraries), step, format, state, grad)
                for each, got, wanted in zip(names, state, expected, strict=True):
                    assert same_bits(got, wanted), (rule, given, format, number, each.name)


def test_steps_are_those_of_torch(libraries):
    """An oracle of another author, to what some ten roundings of an update of 1e-3 come to: 10 * 2^-24 * (1 + 1e-3)."""
    weight = torch.randn(997, generator=torch.Generator().manual_seed(1))
    theirs = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.1)
    state = [weight.clone(), torch.zeros(997), torch.zeros(997)]
    for number in range(1, 4):
        theirs.grad = torch.randn(997, generator=torch.Generator().manual_seed(number))
        step = Step("adam", {**_core.RULES["adam"].hyperparameters, "weight_decay": 0.1}, number)
        update(Emulator(libraries), step, "fp32", state, theirs.grad)
        optimizer.step()
    bound = 3 * 10 * 2.0**-24 * (theirs.detach().abs() + 1e-3)
    assert ((state[0] - theirs.detach()).abs() <= bound).all()


LARGEST = torch.finfo(torch.float32).max
ENDS = (LARGEST, 3.39e38, 1.0, 1.1754944e-38, 1e-40, 1e-45, 0.0, -0.0, float("inf"), float("nan"))


def differing_at_the_ends(libraries) -> list[tuple]:
    """First steps whose moments are given magnitudes: which of them have other bits than the CPU's."""
    found = []
    for rule, source in (("sgd", {"momentum": 0.9}), ("adagrad", {})):
        hyperparameters = {**_core.RULES[rule].hyperparameters, **source, "weight_decay": 0.0}
        step = Step(rule, hyperparameters)
        for format, end, stream in itertools.product(("split-bf16", "compact"), ENDS, (1, 2**63 + 5)):
            # A block with that value as its largest, and one that has nothing else.
            grad = torch.cat([torch.linspace(-1, 1, 64) * end, torch.full((64,), end), torch.randn(9)])
            if rule == "adagrad":
                # The sum is the square.
                grad = grad.abs().double().sqrt().float()
            state = [torch.zeros(each.numel(137), dtype=each.dtype)
                     for each in state_tensors(step, format, torch.bfloat16)]  # fmt: skip
            expected = reference(step, format, state, grad, stream)
            update(Emulator(libraries, seed=3), step, format, state, grad, stream)
            if not all(map(same_bits, state, expected)):
                found.append((rule, format, end, stream))
    return found


def test_moments_at_the_ends_of_their_range(builds, libraries):
    """Of the largest and the smallest numbers, of none, and of what is none. Mistakes that show there alone are made
    here: a unit that is not normal, one whose largest code is infinite, and bf16 that is rounded to infinity."""
    assert differing_at_the_ends(libraries) == []
    for path, old, new in (
        ("include/zx/moments.cuh", "above > LEAST_UNIT ? above : LEAST_UNIT", "above"),
        ("include/zx/moments.cuh", "unit - (finite ? 0u : 1u)", "unit"),
        ("include/zx/codec.cuh", "(sum & INFINITY_BITS) == INFINITY_BITS ? bits_of(value) : sum", "sum"),
    ):
        text = (CUDA / path).read_text()
        assert old in text
        changed = {name: builds.build(name, {path: text.replace(old, new)}) for name in ("sgd", "adagrad")}
        assert differing_at_the_ends(changed) != [], new


def test_random_bits_are_of_the_parameter_and_the_update(libraries):
    """Catches: a stream or a number of updates that is not handed on, so that all parameters and steps round alike."""
    found = []
    for stream, number in ((1, 5), (1, 6), (1 << 40 | 1, 5), (2, 5)):
        step = Step("lion", _core.RULES["lion"].hyperparameters, number)
        state = [torch.zeros(each.numel(256), dtype=each.dtype)
                 for each in state_tensors(step, "split-bf16", torch.bfloat16)]  # fmt: skip
        update(Emulator(libraries), step, "split-bf16", state, torch.linspace(0.1, 1, 256), stream)
        found.append(state[2])
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(found, 2))


def test_refusals():
    """One line each that names the tensor; nothing is launched."""
    step = Step("adam", _core.RULES["adam"].hyperparameters)
    ones, half = torch.ones(4), torch.ones(4, dtype=torch.bfloat16)

    def refused(tensors, grad, format="fp32"):
        with pytest.raises(TensorError) as caught:
            update(None, step, format, tensors, grad)
        return caught.value.name, caught.value.expected, caught.value.got

    assert refused([], ones) == ("tensors", "one", "none")
    assert refused([ones, ones], ones) == ("tensors", "weight, exp_avg, exp_avg_sq", "2")
    assert refused([half, half, ones, ones], ones) == ("master", "float32", "bfloat16")
    assert refused([half, ones, ones, ones], ones, "split") == ("residual", "int16", "float32")
    blocks = torch.zeros(33, dtype=torch.int16)
    bytes_left = torch.zeros(4, dtype=torch.int8)
    assert refused([half, bytes_left, blocks, blocks[:-1]], ones, "compact") == (
        "exp_avg_sq",
        "a tensor of 33 elements",
        "of 32 elements",
    )
    assert refused([half, blocks[:4], half, ones], ones, "split-bf16") == ("exp_avg_sq", "bfloat16", "float32")
    assert refused([ones, ones, torch.ones(5)], ones) == ("exp_avg_sq", "a tensor of 4 elements", "of 5 elements")
    assert refused([ones, ones, ones], ones.double())[0] == "the gradient"
    assert refused([ones, ones, ones], ones.to("meta")) == ("the gradient", "a tensor on cpu", "on meta")
    assert refused([ones, torch.ones(8)[::2], ones], ones)[:2] == ("exp_avg", "a contiguous tensor")
    assert refused([ones, ones, ones.to("meta")], ones) == ("exp_avg_sq", "a tensor on cpu", "on meta")
    assert refused([ones, ones, ones], torch.ones(8)[::2])[:2] == ("the gradient", "a contiguous tensor")
    with pytest.raises(InvalidValueError, match="lr"):
        Step("adam", {**_core.RULES["adam"].hyperparameters, "lr": -1.0})
    with pytest.raises(ValueError, match="step 0: steps are counted from 1"):
        Step("adam", _core.RULES["adam"].hyperparameters, 0)

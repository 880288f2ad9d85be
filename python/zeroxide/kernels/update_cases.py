"""The optimizer step's kernels beside the CPU's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zeroxide import _core
from zeroxide.config import EXACT
from zeroxide.kernels.arguments import FLOATS
from zeroxide.kernels.case import Inputs, KernelCase, numbers
from zeroxide.kernels.core_update import reference, stored
from zeroxide.kernels.launch import Launcher
from zeroxide.kernels.step import CODECS, Step, state_tensors
from zeroxide.kernels.update import update

__all__ = ["CASES"]

DTYPES = {name: dtype for dtype, name in FLOATS.items()}

STEPS = {
    "adamw": Step("adam", {**_core.RULES["adam"].hyperparameters, "weight_decay": 0.1}, 7, 0.25),
    "adam": Step("adam", {**_core.RULES["adam"].hyperparameters, "weight_decay": 0.1, "decoupled": False}, 3, 0.5),
    "lion": Step("lion", {**_core.RULES["lion"].hyperparameters, "lr": 1e-3, "weight_decay": 0.1}, 2 + (5 << 32), 0.25),
    "adagrad": Step("adagrad", {**_core.RULES["adagrad"].hyperparameters, "lr_decay": 0.1, "weight_decay": 0.1}, 5),
    "sgd": Step(
        "sgd",
        {**_core.RULES["sgd"].hyperparameters, "momentum": 0.9, "dampening": 0.3},
        4,
        0.5,
    ),
}  # fmt: skip


STREAM = 0x9ABC_DEF0_1234_5678
"""Random bits of the parameters, of both halves of the key."""


def _case(rule: str, format: str, live: str, grad: str) -> KernelCase:
    step, dtype = STEPS[rule], DTYPES[live]
    expected = state_tensors(step, format, dtype)

    def make(n: int, device: torch.device) -> Inputs:
        weight = 0.05 * numbers(n, 1, torch.float32, device)
        tensors = [weight.to(dtype)]
        for seed, each in enumerate(expected[1:], 2):
            if each.name == "residual":
                # What half-up rounding takes away: the weights here were rounded to even, which differs on ties only.
                step_of_bytes = 4 // each.dtype.itemsize
                tensors.append(weight.view(each.dtype)[step_of_bytes // 4 :: step_of_bytes].contiguous())
            elif each.name == "master":
                tensors.append(weight)
            else:
                moment = 0.01 * numbers(n, seed, torch.float32, device)
                moment = moment.square() if each.name in ("exp_avg_sq", "sum") else moment
                tensors.append(moment if format in EXACT else stored(step, format, each, moment))
        if len(expected) > 2:
            # Somebody has changed every 41st live weight.
            tensors[0][::41] *= 2
        return {"state": tensors, "grad": [numbers(n, 9, DTYPES[grad], device)]}

    def run(launcher: Launcher, inputs: Inputs) -> Sequence[torch.Tensor]:
        update(launcher, step, format, inputs["state"], inputs["grad"][0], STREAM)
        return inputs["state"]

    return KernelCase(
        name=f"update_{rule}_{CODECS[format, live]}_{grad}",
        make=make,
        run=run,
        reference=lambda inputs: reference(step, format, inputs["state"], inputs["grad"][0], STREAM),
        moved=lambda n: 2 * sum(each.numel(n) * each.dtype.itemsize for each in expected) + n * DTYPES[grad].itemsize,
    )


CASES = tuple(
    _case(rule, format, live, grad)
    for rule in STEPS
    for format, live, grads in (
        ("fp32", "f32", ("f32",)),
        ("fp32", "bf16", ("bf16",)),
        ("fp32", "f16", ("f16",)),
        ("split", "bf16", ("f32", "bf16", "f16") if rule == "adamw" else ("bf16",)),
        ("split-bf16", "bf16", ("f32", "bf16", "f16") if rule == "adamw" else ("bf16",)),
        ("compact", "bf16", ("f32", "bf16", "f16") if rule == "adamw" else ("bf16",)),
    )
    for grad in grads
)

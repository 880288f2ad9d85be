"""The optimizer step's kernels beside the CPU's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zeroxide import _core
from zeroxide.kernels.arguments import FLOATS
from zeroxide.kernels.case import Inputs, KernelCase, numbers
from zeroxide.kernels.core_update import reference
from zeroxide.kernels.launch import Launcher
from zeroxide.kernels.step import CODECS, Step, state_tensors
from zeroxide.kernels.update import update

__all__ = ["CASES"]

DTYPES = {name: dtype for dtype, name in FLOATS.items()}

STEPS = {
    "adamw": Step("adam", {**_core.RULES["adam"].hyperparameters, "weight_decay": 0.1}, 7, 0.25),
    "adam": Step("adam", {**_core.RULES["adam"].hyperparameters, "weight_decay": 0.1, "decoupled": False}, 3, 0.5),
    "lion": Step("lion", {**_core.RULES["lion"].hyperparameters, "lr": 1e-3, "weight_decay": 0.1}, 2, 0.25),
    "adagrad": Step("adagrad", {**_core.RULES["adagrad"].hyperparameters, "lr_decay": 0.1, "weight_decay": 0.1}, 5),
    "sgd": Step(
        "sgd",
        {**_core.RULES["sgd"].hyperparameters, "momentum": 0.9, "dampening": 0.3},
        4,
        0.5,
    ),
}  # fmt: skip


def _case(rule: str, format: str, live: str, grad: str) -> KernelCase:
    step, dtype = STEPS[rule], DTYPES[live]
    expected = state_tensors(step, format, dtype)

    def make(n: int, device: torch.device) -> Inputs:
        weight = 0.05 * numbers(n, 1, torch.float32, device)
        tensors = [weight.to(dtype)]
        for seed, (name, _) in enumerate(expected[1:], 2):
            if name == "residual":
                # What half-up rounding takes away: the weights here were rounded to even, which differs on ties only.
                tensors.append(weight.view(torch.int16)[::2].contiguous())
            elif name == "master":
                tensors.append(weight)
            else:
                moment = 0.01 * numbers(n, seed, torch.float32, device)
                tensors.append(moment.square() if name in ("exp_avg_sq", "sum") else moment)
        if len(expected) > 2:
            # Somebody has changed every 41st live weight.
            tensors[0][::41] *= 2
        return {"state": tensors, "grad": [numbers(n, 9, DTYPES[grad], device)]}

    def run(launcher: Launcher, inputs: Inputs) -> Sequence[torch.Tensor]:
        update(launcher, step, format, inputs["state"], inputs["grad"][0])
        return inputs["state"]

    return KernelCase(
        name=f"update_{rule}_{CODECS[format, live]}_{grad}",
        make=make,
        run=run,
        reference=lambda inputs: reference(step, format, inputs["state"], inputs["grad"][0]),
        moved=lambda n: n * (2 * sum(each.itemsize for _, each in expected) + DTYPES[grad].itemsize),
    )


CASES = tuple(
    _case(rule, format, live, grad)
    for rule in STEPS
    for format, live, grads in (
        ("fp32", "f32", ("f32",)),
        ("fp32", "bf16", ("bf16",)),
        ("fp32", "f16", ("f16",)),
        ("split", "bf16", ("f32", "bf16", "f16") if rule == "adamw" else ("bf16",)),
    )
    for grad in grads
)

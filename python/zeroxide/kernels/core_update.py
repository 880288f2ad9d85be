"""The optimizer step of `update.py` by the CPU kernels, and the cases that compare the two.

This is the update's reference instead of a formula in torch, because it is what a GPU's part of the state must agree
with, bit by bit; tests of the CPU kernels compare those with torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zeroxide import _core
from zeroxide.device.placement import HOST, spec, view_of
from zeroxide.kernels.arguments import FLOATS
from zeroxide.kernels.case import Inputs, KernelCase, numbers
from zeroxide.kernels.launch import Launcher
from zeroxide.kernels.update import CODECS, Step, state_tensors, update

__all__ = ["CASES", "reference"]

DTYPES = {name: dtype for dtype, name in FLOATS.items()}
# A live weight whose residual may be anything without the two being a NaN.
ONE = 0x3F80 << 16


def reference(step: Step, format: str, tensors: Sequence[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """What the state tensors are after the step, as the core makes them of copies in host memory."""
    device = grad.device
    host = [each.detach().to(HOST, copy=True).view(-1) for each in (*tensors, grad)]
    *state, gradient = host
    live, numel = state[0], state[0].numel()
    if numel == 0:
        return list(tensors)
    expected = state_tensors(step, format, live.dtype)
    core = _one_unit(step, format, FLOATS[live.dtype], FLOATS[gradient.dtype], numel)
    has_exact = len(expected) > 1 and expected[1][0] in ("master", "residual")
    exact = state[1] if has_exact else live
    values = exact if exact.dtype is torch.float32 else (ONE + exact.int()).view(torch.float32)
    _fill(core, "weights", values)
    window = core.window(0)
    assert window is not None
    shown = view_of(window, live.dtype, 0, numel)
    shown.copy_(live)
    moments = [name for name, _ in expected[2 if has_exact else 1 :]]
    for name, tensor in zip(moments, state[2 if has_exact else 1 :], strict=True):
        _fill(core, name, tensor)
    core.accumulate(0, 0, 0, spec(gradient), False)
    core.set_updates(0, 0, step.number - 1)
    core.step([step.core_rule()], step.grad_scale)
    core.finish()
    results = [shown.clone()]
    for name in ["weights"] * has_exact + moments:
        out = torch.empty(numel)
        core.read_param(0, 0, name, 0, spec(out))
        results.append(out)
    if has_exact and exact.dtype is torch.int16:
        results[1] = results[1].view(torch.int16)[::2].contiguous()
    core.close()
    return [result.view(tensors[0].shape).to(device) for result in results]


def _one_unit(step: Step, format: str, compute: str, grad: str, numel: int) -> _core.Offload:
    unit = _core.UnitSpec(
        name="state",
        params=[(numel, True)],
        weights=_core.WeightHome.HOST,
        state=_core.StateHome.HOST,
        optimizer=step.core_rule(),
        format=format,
    )
    settings = _core.Settings(
        limit=None,
        threads=1,
        compute=compute,
        grad=grad,
        tile_elements=_core.DEFAULT_TILE_ELEMENTS,
        staging_bytes=0,
        gathered_bytes=0,
        engine=_core.IoEngine.AUTO,
        queue_depth=4,
        directories=[],
        job="reference",
    )
    return _core.Offload(settings, [unit])


def _fill(core: _core.Offload, part: str, values: torch.Tensor) -> None:
    core.fill_begin(0, part)
    core.fill_param(0, 0, 0, spec(values))
    core.fill_commit(0)


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

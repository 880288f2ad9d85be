"""The optimizer step of `update.py` by the CPU kernels.

This is the update's reference instead of a formula in torch, because it is what a GPU's part of the state must agree
with, bit by bit; tests of the CPU kernels compare those with torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zeroxide import _core
from zeroxide.device.placement import HOST, spec, view_of
from zeroxide.kernels.arguments import FLOATS
from zeroxide.kernels.step import Step, state_tensors

__all__ = ["reference"]

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

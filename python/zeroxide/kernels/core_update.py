"""The optimizer step of `update.py` by the CPU kernels.

This is the update's reference instead of a formula in torch, because it is what a GPU's part of the state must agree
with, bit by bit; tests of the CPU kernels compare those with torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zeroxide import _core
from zeroxide.device.placement import HOST, spec
from zeroxide.kernels.arguments import FLOATS
from zeroxide.kernels.step import StateTensor, Step

__all__ = ["reference", "stored"]


def reference(
    step: Step, format: str, tensors: Sequence[torch.Tensor], grad: torch.Tensor, stream: int = 0, first: int = 0
) -> list[torch.Tensor]:
    """What the state tensors are after the step, as the core's kernels make them of copies in host memory.

    stream: the parameter's random bits, for a format that rounds. first: the element of the parameter that the tensors
    begin at, a multiple of 64.
    """
    if grad.numel() == 0:
        return list(tensors)
    # Also where a single element has an odd stride.
    host = [each.detach().to(HOST, copy=True).as_strided((each.numel(),), (1,)) for each in (*tensors, grad)]
    *state, gradient = host
    _core.update_state(
        step.core_rule(),
        step.number,
        step.grad_scale,
        format,
        FLOATS[state[0].dtype],
        [spec(each.view(torch.uint8)) for each in state],
        spec(gradient),
        stream,
        first,
    )
    return [after.view(given.shape).to(grad.device) for after, given in zip(state, tensors, strict=True)]


def stored(step: Step, format: str, tensor: StateTensor, values: torch.Tensor) -> torch.Tensor:
    """fp32 values of a rule's own tensor as a format for bf16 weights keeps them, rounded to the nearest."""
    out = torch.zeros(tensor.numel(values.numel()), dtype=tensor.dtype, device=HOST)
    given = spec(values.to(HOST)), spec(out.view(torch.uint8))
    _core.encode_moment(step.core_rule(), format, "bf16", tensor.name, *given)
    return out.to(values.device)

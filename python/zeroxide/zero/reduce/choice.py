"""Which way gradients are reduced."""

from __future__ import annotations

import torch

from zeroxide import _core
from zeroxide.plan.plan import Plan
from zeroxide.zero.messages import Messages
from zeroxide.zero.reduce.gradient_reduction import (
    CollectiveGradients,
    GradientReduction,
    SharedGradients,
    SingleRankGradients,
)
from zeroxide.zero.reduce.quantised import QuantisedGradients
from zeroxide.zero.unit import Unit

__all__ = ["make_reduction"]


def make_reduction(
    core: _core.Offload, plan: Plan, units: list[Unit], messages: Messages, dtype: torch.dtype
) -> GradientReduction:
    """What reduces the gradients of `units` over the ranks that `messages` go between; they travel in `dtype`."""
    if plan.world == 1:
        return SingleRankGradients()
    if plan.transport == "shared":
        return SharedGradients(core, units, messages, dtype)
    if plan.quantisation.gradients and any(unit.num_trainable for unit in units):
        return QuantisedGradients(core, units, messages, dtype, plan)
    return CollectiveGradients(core, units, messages, dtype, kept=plan.grad)

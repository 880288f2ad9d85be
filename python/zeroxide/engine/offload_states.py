"""`engine.offload_states`: what scripts call to free the device between training and generation.

State that is at home in host memory or on disk is not on the device to begin with: there is nothing to move. What is at
home on the device stays there, and whoever asks for it to move is told which setting puts it elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable

from zeroxide.device.placement import is_host
from zeroxide.errors import ConfigError, ModelError
from zeroxide.plan.plan import Plan

__all__ = ["STATES", "check_offload"]

STATES = ("optim_states", "hp_params", "lp_params", "lp_grads", "contiguous_grad_buffer")
"""DeepSpeed's words: moments, exact weights, weights that the model computes with, and gradients."""


def check_offload(plan: Plan, include: Iterable[str] | None, device: str) -> None:
    """Returns where nothing of `include` (None: everything) is on the device between steps.

    Raises ConfigError for a word that is not DeepSpeed's and for NVMe, ModelError for what stays on the device.
    """
    asked = list(STATES) if include is None else [str(getattr(each, "value", each)) for each in include]
    for each in asked:
        if each not in STATES:
            raise ConfigError(
                f"offload_states: include: expected some of {', '.join(STATES)}, got {each}", path="include"
            )
    to = str(getattr(device, "value", device))
    if to not in ("cpu", "none"):
        raise ConfigError(f"offload_states: device: expected cpu or none, got {to}", path="device")
    if to == "none" or is_host(plan.device):
        return
    state = [each for each in asked if each != "lp_params"]
    if state and plan.units_on_device:
        raise ModelError(
            f"offload_states: {', '.join(state)} of {len(plan.units_on_device)} units are at home on {plan.device} and "
            'stay there: set zero_optimization.offload_optimizer to {"device": "cpu"}'
        )
    if "lp_params" in asked and not plan.transient:
        raise ModelError(
            f"offload_states: the weights stay on {plan.device}, where the model computes with them: leave lp_params "
            'out of include, or set zero_optimization.offload_param to {"device": "cpu"} at stage 3'
        )

"""One step of an optimizer rule, and the state tensors that it changes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from zeroxide import _core
from zeroxide.kernels.arguments import FLOATS
from zeroxide.kernels.constants import CONSTANTS, coupled

__all__ = ["CODECS", "Step", "state_tensors"]

CODECS = {("fp32", "f32"): "fp32", ("fp32", "bf16"): "master_bf16", ("fp32", "f16"): "master_f16",
          ("split", "bf16"): "split"}  # fmt: skip
"""What entry points call a state format for weights of a dtype."""


@dataclass(frozen=True)
class Step:
    """One step of a rule. All elements share it, and what they have in common is worked out once.

    rule: its name in a parameter group. hyperparameters: all of them, by name, as `_core.RULES[rule].hyperparameters`
    lists them. number: of the step, from 1. grad_scale: multiplies every gradient first. Raises what the rule raises
    for a hyperparameter that is outside of its range.
    """

    rule: str
    hyperparameters: Mapping[str, float]
    number: int = 1
    grad_scale: float = 1.0

    def __post_init__(self) -> None:
        # A copy: what is worked out once must not change.
        object.__setattr__(self, "hyperparameters", dict(self.hyperparameters))
        self.core_rule()
        if self.number < 1:
            raise ValueError(f"step {self.number}: steps are counted from 1")

    @functools.cached_property
    def constants(self) -> bytes:
        """The rule's constants as kernels take them."""
        _, prepare = CONSTANTS[self.rule]
        return bytes(prepare(self.hyperparameters, self.number, self.grad_scale))

    @functools.cached_property
    def kernel_rule(self) -> str:
        """What kernels call the rule."""
        return "adamw" if self.rule == "adam" and not coupled(self.hyperparameters) else self.rule

    @functools.cached_property
    def listed(self) -> dict[tuple[str, torch.dtype], list[tuple[str, torch.dtype]]]:
        """State tensors by format and dtype of the live weight, as far as they were asked for."""
        return {}

    def core_rule(self) -> _core.Rule:
        """The rule as the core takes it."""
        return _core.RULES[self.rule](**self.hyperparameters)


def state_tensors(step: Step, format: str, live: torch.dtype) -> list[tuple[str, torch.dtype]]:
    """Name and dtype of each state tensor, the live weight first."""
    listed = step.listed.get((format, live))
    if listed is None:
        found = _core.state_tensors(step.core_rule(), format, FLOATS[live])
        listed = step.listed[format, live] = [(name, getattr(torch, dtype)) for name, dtype, _, _ in found]
    return listed

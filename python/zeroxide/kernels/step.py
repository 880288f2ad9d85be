"""One step of an optimizer rule, and the state tensors that it changes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from zeroxide import _core
from zeroxide.kernels.arguments import FLOATS

__all__ = ["CODECS", "Step", "state_tensors"]

CODECS = {("fp32", "f32"): "fp32", ("fp32", "bf16"): "master_bf16", ("fp32", "f16"): "master_f16",
          ("split", "bf16"): "split"}  # fmt: skip
"""What entry points call a state format for weights of a dtype."""


@dataclass(frozen=True)
class Step:
    """One step of a rule. All elements share it.

    rule: its name in a parameter group. hyperparameters: all of them, by name, as `_core.RULES[rule].hyperparameters`
    lists them. number: of the step, from 1. grad_scale: multiplies every gradient first. Raises what the rule raises
    for a hyperparameter that is outside of its range.
    """

    rule: str
    hyperparameters: Mapping[str, float]
    number: int = 1
    grad_scale: float = 1.0

    def __post_init__(self) -> None:
        self.core_rule()
        if self.number < 1:
            raise ValueError(f"step {self.number}: steps are counted from 1")

    def core_rule(self) -> _core.Rule:
        """The rule as the core takes it."""
        return _core.RULES[self.rule](**self.hyperparameters)


def state_tensors(step: Step, format: str, live: torch.dtype) -> list[tuple[str, torch.dtype]]:
    """Name and dtype of each state tensor, the live weight first."""
    return list(_state_tensors(step.rule, tuple(step.hyperparameters.items()), format, live))


@functools.lru_cache(maxsize=256)
def _state_tensors(
    rule: str, hyperparameters: tuple[tuple[str, float], ...], format: str, live: torch.dtype
) -> tuple[tuple[str, torch.dtype], ...]:
    """The same, asked of the core once: an update of every range of parameters wants to know."""
    listed = _core.state_tensors(_core.RULES[rule](**dict(hyperparameters)), format, FLOATS[live])
    return tuple((name, getattr(torch, dtype)) for name, dtype, _, _ in listed)

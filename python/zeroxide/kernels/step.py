"""One step of an optimizer rule, and the state tensors that it changes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from zeroxide import _core
from zeroxide.config import EXACT
from zeroxide.kernels.arguments import FLOATS
from zeroxide.kernels.constants import CONSTANTS, coupled

__all__ = ["BLOCK", "CODECS", "ROUNDING", "StateTensor", "Step", "state_tensors", "stored_as"]

CODECS = {("fp32", "f32"): "fp32", ("fp32", "bf16"): "master_bf16", ("fp32", "f16"): "master_f16",
          ("split", "bf16"): "split", ("split-bf16", "bf16"): "split_bf16", ("compact", "bf16"): "compact"}  # fmt: skip
"""What entry points call a state format for weights of a dtype."""

ROUNDING = frozenset(codec for (format, _), codec in CODECS.items() if format not in EXACT)
"""Those whose kernels round at random, and so take random bits."""

BLOCK = 64
"""Elements of a block, which a format that rounds updates together."""


class StateTensor(NamedTuple):
    """A state tensor as it is stored. per_block: elements of `dtype` that hold 64 elements of the parameter."""

    name: str
    dtype: torch.dtype
    per_block: int

    def numel(self, elements: int) -> int:
        """Elements of `dtype` for so many of the parameter, from the start of a block on; the last block counts whole
        where it is one."""
        return elements if self.per_block == BLOCK else -(-elements // BLOCK) * self.per_block

    def place(self, where: slice) -> slice:
        """Where elements of the parameter's unit are, which begin at a block where there are blocks."""
        first = self.numel(where.start)
        return slice(first, first + self.numel(where.stop - where.start))


def stored_as(name: str, dtype: str, nbytes: int) -> StateTensor:
    """A state tensor by what `_core.state_tensors` says of it. Blocks of codes, for which torch has no dtype, are words
    of 16 bits: a unit, and two codes in each of the others."""
    found = torch.int16 if dtype.endswith("blocks of 8 bits") else getattr(torch, dtype)
    return StateTensor(name, found, nbytes // found.itemsize)


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
    def listed(self) -> dict[tuple[str, torch.dtype], list[StateTensor]]:
        """State tensors by format and dtype of the live weight, as far as they were asked for."""
        return {}

    def core_rule(self) -> _core.Rule:
        """The rule as the core takes it."""
        return _core.RULES[self.rule](**self.hyperparameters)


def state_tensors(step: Step, format: str, live: torch.dtype) -> list[StateTensor]:
    """The state tensors, the live weight first."""
    listed = step.listed.get((format, live))
    if listed is None:
        found = _core.state_tensors(step.core_rule(), format, FLOATS[live])
        listed = step.listed[format, live] = [stored_as(name, dtype, nbytes) for name, dtype, nbytes, _ in found]
    return listed

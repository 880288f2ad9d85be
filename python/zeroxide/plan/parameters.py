"""A parameter of a model as a plan has it: names, owners, and what it takes of its unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from zeroxide.device.placement import address, in_host_memory
from zeroxide.errors import ModelError

__all__ = ["EXTERNAL", "ParameterPlan", "check_sharing"]

EXTERNAL = "_external_parameters"
"""Attribute of a module: parameters of others that its forward uses."""


@dataclass(frozen=True)
class ParameterPlan:
    """One parameter: its first name in the model, and the modules that own it.

    `shape`, `numel` and `dtype` are those it has while gathered: the parameter itself is empty for most of its life.
    `words` is what it takes of its unit, in elements of the compute dtype: its elements, or for a frozen parameter as
    many as its bytes need.
    """

    name: str
    param: nn.Parameter
    owners: tuple[tuple[str, nn.Module], ...]
    shape: torch.Size
    numel: int
    trainable: bool
    dtype: torch.dtype
    words: int
    opaque: bool
    """Frozen and of a class of its own: its elements are what that class makes of them, not numbers to be rounded."""
    expert: bool = False
    """Of an expert that only some of the ranks have."""


def check_sharing(entries: Sequence[ParameterPlan]) -> None:
    """Raises ModelError where a trained parameter has memory in common with another one, as after `b.data = a.data`.

    They would be two from here on. Tied parameters are one parameter, and have one entry.
    """
    spans = []
    for entry in entries:
        param = entry.param
        if in_host_memory(param) and param.layout is torch.strided and param.numel() and param.is_contiguous():
            start = address(param)
            spans.append((start, start + param.numel() * param.element_size(), entry))
    spans.sort(key=lambda span: span[:2])
    for (_, end, before), (start, _, after) in pairwise(spans):
        if start < end and (before.trainable or after.trainable):
            raise ModelError(
                f"{before.name} and {after.name} are two parameters over the same memory, which would part: make them "
                f"one parameter, or give {after.name} a copy",
                name=after.name,
            )

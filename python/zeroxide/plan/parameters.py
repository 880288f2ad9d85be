"""The parameters of a model as a plan has them: names, owners, and what each takes of its unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from zeroxide.device.placement import address, in_compute_memory
from zeroxide.errors import ModelError
from zeroxide.params.empty import full_class
from zeroxide.params.handle import ManagedParameter, shape_of
from zeroxide.precision.bits import ORDINARY

__all__ = ["EXTERNAL", "ParameterPlan", "check_sharing", "parameters_of"]

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


def parameters_of(module: nn.Module, compute: torch.dtype, *, cast: bool) -> Iterator[ParameterPlan]:
    """Every parameter once, with all its owners, in the order of the first.

    cast: frozen parameters in fp32, bf16 and fp16 are to have the compute dtype, unless that is fp32.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    first: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, owner in module.named_modules():
        for name, param in owner._parameters.items():
            if param is None:
                continue
            owners.setdefault(id(param), []).append((prefix, owner))
            first.setdefault(id(param), (f"{prefix}.{name}" if prefix else name, param))
    for prefix, user in module.named_modules():
        for param in user.__dict__.get(EXTERNAL, ()):
            if id(param) in first and all(user is not owner for _, owner in owners[id(param)]):
                owners[id(param)].append((prefix, user))
    for key, (name, param) in first.items():
        shape = shape_of(param)
        # 4-bit weights, for one, lie in the words of any dtype.
        opaque = not param.requires_grad and full_class(param) not in (nn.Parameter, ManagedParameter)
        dtype = compute if param.requires_grad or (cast and not opaque and _is_cast(param, compute)) else param.dtype
        yield ParameterPlan(
            name=name,
            param=param,
            owners=tuple(owners[key]),
            shape=shape,
            numel=shape.numel(),
            trainable=param.requires_grad,
            dtype=dtype,
            words=-(-shape.numel() * dtype.itemsize // compute.itemsize),
            opaque=opaque,
        )


def _is_cast(param: nn.Parameter, compute: torch.dtype) -> bool:
    """Whether a frozen parameter takes the dtype of a bf16 or fp16 config, as DeepSpeed casts the module."""
    return compute is not torch.float32 and param.dtype in ORDINARY


def check_sharing(entries: Sequence[ParameterPlan]) -> None:
    """Raises ModelError where a trained parameter has memory in common with another one, as after `b.data = a.data`.

    They would be two from here on. Tied parameters are one parameter, and have one entry.
    """
    spans = []
    for entry in entries:
        param = entry.param
        if in_compute_memory(param) and param.layout is torch.strided and param.numel() and param.is_contiguous():
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

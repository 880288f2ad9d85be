"""What travels between stages: a tensor, or tuples, lists and dicts of tensors and plain values, to any depth."""

from __future__ import annotations

from typing import Any

import torch

from zeroxide.errors import ModelError

__all__ = ["flatten", "rebuild"]

_PLAIN = (bool, int, float, str, type(None))


def flatten(value: Any, what: str) -> tuple[Any, list[torch.Tensor]]:
    """The structure of `value`, which JSON can hold, and its tensors in order.

    Raises ModelError, naming `what`, for anything else than tensors, plain values, tuples, lists and dicts by words.
    """
    tensors: list[torch.Tensor] = []
    return _walk(value, what, tensors), tensors


def _walk(value: Any, what: str, tensors: list[torch.Tensor]) -> Any:
    """The structure of `value`, whose tensors go into the list.

    A function of the module: one inside of `flatten` would be in a cycle with the list, which would keep activations
    and gradients in memory until the collector comes by.
    """
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            raise ModelError(f"{what} is a tensor of layout {value.layout}: only dense ones travel between stages")
        tensors.append(value)
        return ["tensor", len(tensors) - 1]
    if type(value) in _PLAIN:
        return ["plain", value]
    if type(value) in (tuple, list):
        return [type(value).__name__, [_walk(item, what, tensors) for item in value]]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return ["dict", [[key, _walk(item, what, tensors)] for key, item in value.items()]]
    raise ModelError(
        f"{what} has a {type(value).__name__} in it: between stages travel tensors, numbers, words and None, in "
        "tuples, lists and dicts by words"
    )


def rebuild(structure: Any, tensors: list[torch.Tensor]) -> Any:
    """The inverse of `flatten`."""
    kind, held = structure
    if kind == "tensor":
        return tensors[held]
    if kind == "plain":
        return held
    if kind == "dict":
        return {key: rebuild(item, tensors) for key, item in held}
    items = [rebuild(item, tensors) for item in held]
    return tuple(items) if kind == "tuple" else items

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

    def walk(each: Any) -> Any:
        if isinstance(each, torch.Tensor):
            if each.layout is not torch.strided:
                raise ModelError(f"{what} is a tensor of layout {each.layout}: only dense ones travel between stages")
            tensors.append(each)
            return ["tensor", len(tensors) - 1]
        if type(each) in _PLAIN:
            return ["plain", each]
        if type(each) in (tuple, list):
            return [type(each).__name__, [walk(item) for item in each]]
        if isinstance(each, dict) and all(isinstance(key, str) for key in each):
            return ["dict", [[key, walk(item)] for key, item in each.items()]]
        raise ModelError(
            f"{what} has a {type(each).__name__} in it: between stages travel tensors, numbers, words and None, in "
            "tuples, lists and dicts by words"
        )

    return walk(value), tensors


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

"""Tensors in what modules take and give: nested tuples, lists, dicts, dataclasses and pytrees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Given", "given", "handed_through", "replaced", "tensors_in"]

Given = dict[int, tuple[torch.Tensor, int]]
"""Tensors that a module was given, by their identity, each with its version then."""


def given(tensors: Iterable[torch.Tensor]) -> Given:
    """The tensors as they are now, to be told later from what was made of them."""
    return {id(tensor): (tensor, _version(tensor)) for tensor in tensors}


def handed_through(tensor: torch.Tensor, before: Given) -> bool:
    """Whether the tensor is one of those given before, and no operation in place has made it something new since."""
    found = before.get(id(tensor))
    return found is not None and found[1] == _version(tensor)


def _version(tensor: torch.Tensor) -> int:
    # Nothing that autograd records changes an inference tensor.
    return 0 if tensor.is_inference() else tensor._version


def tensors_in(*trees: Any) -> list[torch.Tensor]:
    """Every tensor in nested containers, dataclasses among them."""
    found: list[torch.Tensor] = []
    todo, tensor = list(trees), torch.Tensor
    # What nearly every module takes and gives, without the cost of looking for other kinds of containers; the list
    # grows while it is gone through.
    for each in todo:
        if each is None:
            continue
        if isinstance(each, tensor):
            found.append(each)
            continue
        kind = type(each)
        if kind is tuple or kind is list:
            todo += each
        elif kind is dict:
            todo += each.values()
        elif kind is not bool:
            for leaf in tree_leaves(each):
                if isinstance(leaf, torch.Tensor):
                    found.append(leaf)
                elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
                    todo += [getattr(leaf, field.name) for field in dataclasses.fields(leaf)]
    return found


def replaced(tree: Any, act: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The tree with `act` done to every tensor that `tensors_in` finds in it."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        changed = {field.name: replaced(getattr(tree, field.name), act) for field in dataclasses.fields(tree)}
        for name, value in changed.items():
            if value is not getattr(tree, name):
                setattr(tree, name, value)
        return tree
    return tree_map(lambda leaf: act(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)

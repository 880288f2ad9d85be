"""Hooks without handles are called when torch calls those that are registered, with the same gradient."""

from __future__ import annotations

import pytest
import torch

from zeroxide.zero.gradient_hooks import add_hook


class Subclass(torch.Tensor):
    """Not exactly a tensor."""


def made(kind: str, leaf: torch.Tensor) -> torch.Tensor:
    tensor = leaf * 2
    if kind == "subclass":
        return tensor.as_subclass(Subclass)
    if kind == "view of a changed base":
        view = tensor[:2]
        tensor.mul_(3)
        return view
    return tensor


@pytest.mark.parametrize("kind", ["tensor", "subclass", "view of a changed base"])
def test_hooks_are_called_in_order_with_the_gradient(kind):
    """Catches: a hook that is put on a tensor without its gradient function hearing of it."""
    leaf = torch.ones(4, requires_grad=True)
    tensor = made(kind, leaf)
    called: list[tuple[str, list[float]]] = []

    def note(name):
        return lambda grad: called.append((name, grad.tolist()))

    add_hook(tensor, note("first"))
    tensor.register_hook(note("torch's"))
    add_hook(tensor, note("last"))
    (tensor * 5).sum().backward()
    expected = [5.0] * tensor.numel()
    assert called == [("first", expected), ("torch's", expected), ("last", expected)]
    assert leaf.grad is not None

"""Hooks on the gradients of tensors that a pass has made, which live as long as its graph and are never removed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch

__all__ = ["add_hook"]


def add_hook(tensor: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> None:
    """`tensor.register_hook(hook)` for a tensor that is no leaf, without a handle.

    Right after the work of a module nothing that torch's method needs is in the caches of the processor, and most of
    the time that it then takes goes to the handle, which would remove the hook again.
    """
    if type(tensor) is not torch.Tensor:
        tensor.register_hook(hook)  # type: ignore[no-untyped-call]
        return
    hooks = tensor._backward_hooks
    if hooks is None:
        # The gradient function that the tensor has now, also where it is a view whose base has changed.
        node = tensor.grad_fn
        assert node is not None, "a leaf keeps its hooks itself"
        hooks = tensor._backward_hooks = OrderedDict()
        node._register_hook_dict(tensor)
    # torch's own keys are numbers.
    hooks[hook] = hook  # type: ignore[index]

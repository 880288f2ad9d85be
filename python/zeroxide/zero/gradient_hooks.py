"""Hooks on the gradients of tensors that a pass has made, which live as long as its graph and are never removed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch

from zeroxide.errors import ModelError

__all__ = ["add_hook", "on_gradient"]


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


def on_gradient(tensors: Iterable[torch.Tensor], act: Callable[[], None], params_always_full: bool) -> None:
    """Runs `act` when the gradient of any of the tensors is known."""

    def hook(grad: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            if torch._C._functorch.peek_interpreter_stack() is not None:
                if params_always_full:
                    # A transform of torch.func accumulates no gradient, and needs nothing brought.
                    return
                raise ModelError(
                    "torch.func over an engine's module at stage 3: its transforms run beside the passes that weights "
                    "are brought for; use stages 0 to 2, or torch.autograd"
                )
            raise ModelError(
                "backward with create_graph=True: a graph of the backward would refer to weights that are gone when it "
                "is used; double backward is not supported"
            )
        act()

    for tensor in tensors:
        # A leaf is nothing that the module has made; a hook on it would stay for ever.
        if tensor.grad_fn is not None:
            add_hook(tensor, hook)

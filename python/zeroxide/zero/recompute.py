"""Computes activations of chosen modules again in backward: torch's checkpointing around the forward of each.

It stands inside of the module's hooks, which run once, as they do around layers of transformers that checkpoint
themselves: the engine's gather weights before the module in forward, and before its part of backward. Modules inside
come to their own hooks in both, and these know that a forward within backward is a recomputation.

What forward is given is saved as autograd saves anything, keyword arguments and contents of containers among it: it
may wait on disk, and what was changed in place since is refused by torch. Random numbers are the same again, those of
torch by torch, those of Python and numpy here. What a second forward would change twice is refused by name: buffers of
the module, what it is given, and caches of keys and values.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from zeroxide.errors import ModelError
from zeroxide.plan.recompute import RecomputedModule
from zeroxide.precision.bits import bytes_of
from zeroxide.zero.hook_handle import Method
from zeroxide.zero.nested import given, handed_through

__all__ = ["Recomputed", "recompute"]

_CACHE = "Cache"
"""The class that caches of transformers derive from."""


class Recomputed:
    """What has been put on one module, until it is removed."""

    def __init__(self, each: RecomputedModule, has_values: bool) -> None:
        self._name = each.name
        self._module = each.module
        self._looked = not has_values
        """Whether the values of buffers were compared: some operations of torch change them and leave the version."""
        # Copies of the module have the forward of its class.
        self._method = Method.put(each.module, "forward", self._forward, each.module.forward)

    def remove(self) -> None:
        """The module's activations are kept again."""
        self._method.take_off()
        self._method.disarm()

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        leaves, shape = tree_flatten((args, kwargs))
        for leaf in leaves:
            if _is_cache(leaf):
                raise self._refused(
                    f"is given a {type(leaf).__name__} of keys and values, which a second forward in backward would "
                    "extend again: call the model with use_cache=False, or set model.config.use_cache to False"
                )
        inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        as_given = given(inputs)
        versions = {name: given([buffer]) for name, buffer in self._module.named_buffers()}
        values = {} if self._looked else {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        again = partial(_call, forward, shape)
        result = checkpoint(again, *leaves, use_reentrant=False, context_fn=_same_random_numbers)
        for name, buffer in self._module.named_buffers():
            same = handed_through(buffer, versions.get(name, {}))
            if not same or (name in values and not torch.equal(bytes_of(buffer), bytes_of(values[name]))):
                raise self._refused(
                    f"changes its buffer {name} in forward, which a second forward in backward would change again: "
                    "recompute fewer blocks, or none"
                )
        self._looked = True
        if not all(handed_through(tensor, as_given) for tensor in inputs):
            raise self._refused(
                "changes in place what it is given, from which a second forward in backward would not compute the "
                "same: recompute fewer blocks, or none"
            )
        return result

    def _refused(self, why: str) -> ModelError:
        return ModelError(f"zeroxide.recompute: {self._name} {why}", name=self._name)


def recompute(modules: Iterable[RecomputedModule], *, has_values: bool = True) -> list[Recomputed]:
    """From here on the modules' activations are computed again in backward, until what is returned is removed.

    has_values: whether buffers have, which are then looked at.
    """
    return [Recomputed(each, has_values) for each in modules]


def _call(forward: Callable[..., Any], shape: Any, *leaves: Any) -> Any:
    args, kwargs = tree_unflatten(list(leaves), shape)
    return forward(*args, **kwargs)


def _same_random_numbers() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for forward and for its repetition."""
    return nullcontext(), _drawing_again(random.getstate(), np.random.get_state(legacy=False))


@contextmanager
def _drawing_again(python: Any, numpy: Any) -> Iterator[None]:
    """Within it Python's and numpy's generators give what they gave after these states."""
    before = random.getstate(), np.random.get_state(legacy=False)
    random.setstate(python)
    np.random.set_state(numpy)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _is_cache(value: Any) -> bool:
    """Whether it is what transformers keeps keys and values of earlier tokens in."""
    return not isinstance(value, torch.Tensor) and any(
        kind.__name__ == _CACHE and kind.__module__.partition(".")[0] == "transformers" for kind in type(value).__mro__
    )

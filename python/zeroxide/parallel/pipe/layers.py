"""Layers that are described before they are built, so that each is built on its own stage alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from zeroxide.errors import ModelError

__all__ = ["LayerSpec", "TiedLayerSpec"]


class LayerSpec:
    """A layer of a pipeline: a class of modules and what it is made with. The signature of DeepSpeed's.

    Raises ModelError for something else than a class of modules.
    """

    def __init__(self, typename: type[nn.Module], *module_args: Any, **module_kwargs: Any) -> None:
        given: object = typename
        if not (isinstance(given, type) and issubclass(given, nn.Module)):
            raise ModelError(f"LayerSpec: expected a class of torch.nn.Module, got {typename!r}")
        self.typename = typename
        self.module_args = module_args
        self.module_kwargs = module_kwargs

    def __repr__(self) -> str:
        given = [*map(repr, self.module_args), *(f"{name}={value!r}" for name, value in self.module_kwargs.items())]
        return f"{self.typename.__name__}({', '.join(given)})"

    def build(self, log: bool = False) -> nn.Module:
        """Makes the module. `log` has no effect: which stage has which layers is in the engine's report."""
        return self.typename(*self.module_args, **self.module_kwargs)


class TiedLayerSpec(LayerSpec):
    """A layer that shares its module with all others of the same `key`. The signature of DeepSpeed's.

    forward_fn: called as `forward_fn(module, inputs)` in place of the module, as for a projection that is the transpose
        of an embedding.
    tied_weight_attr: names of parameters that several layers use, dotted where they are deeper ("linear.weight"), or of
        properties that are one. Where the layers are on several stages, each stage has a copy of all of the module's
        parameters, all copies get the sum of their gradients, and they stay equal. (DeepSpeed keeps equal those alone
        that are named, and the others drift apart.)
    """

    def __init__(
        self,
        key: str,
        typename: type[nn.Module],
        *module_args: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        tied_weight_attr: str | Sequence[str] = ("weight",),
        **module_kwargs: Any,
    ) -> None:
        super().__init__(typename, *module_args, **module_kwargs)
        self.key = key
        self.forward_fn = forward_fn
        self.tied_weight_attr = [tied_weight_attr] if isinstance(tied_weight_attr, str) else list(tied_weight_attr)

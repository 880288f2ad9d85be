"""Engines without an optimizer, which only evaluate: their parameters take no gradient, so none is kept room for."""

from __future__ import annotations

from torch import nn

__all__ = ["freeze", "thaw"]


def freeze(module: nn.Module) -> list[str]:
    """Takes the gradients off every parameter; the names of those that had one."""
    names = [name for name, param in module.named_parameters() if param.requires_grad]
    module.requires_grad_(False)
    return names


def thaw(module: nn.Module, names: list[str]) -> None:
    """Undoes `freeze`, for parameters that are still there."""
    for name, param in module.named_parameters():
        if name in names:
            param.requires_grad_(True)

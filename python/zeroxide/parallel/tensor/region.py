"""What lies between layers that cut their output and those that sum: activations of which each rank has a part.

Two things hold within it. Layers that take the same input, such as queries, keys and values, share its gradient, so
that it is summed over ranks once. And random numbers differ from rank to rank, as each drops other elements, while
outside all ranks must drop the same.
"""

from __future__ import annotations

import torch
from torch import nn

from zeroxide.device.placement import HOST, is_host
from zeroxide.parallel.tensor.group import TensorGroup

__all__ = ["Region", "drops"]

_GOLDEN = 0x9E3779B97F4A7C15
"""Spreads the ranks' seeds (2^64 divided by the golden ratio, as SplitMix64 does)."""


def drops(module: nn.Module) -> bool:
    """Whether anything in it is dropped at random while it trains: by a probability of its own, or a dropout module."""
    return any(
        isinstance(value, float) and value > 0
        for each in module.modules()
        for name, value in vars(each).items()
        if "drop" in name or (name == "p" and isinstance(each, nn.Dropout))
    )


class Region:
    """One such stretch of a model, as an attention or a feed-forward layer has one."""

    def __init__(self, group: TensorGroup, owner: nn.Module) -> None:
        self.group = group
        self.owner = owner
        self._inputs: list[tuple[torch.Tensor, int, torch.Tensor]] = []
        self._outside: tuple[torch.Tensor, torch.Tensor | None] | None = None
        owner.register_forward_pre_hook(self._begin, prepend=True)
        # Also where an error, or a checkpoint that has recomputed enough, leaves it half way.
        owner.register_forward_hook(self._end, always_call=True)

    def _begin(self, owner: nn.Module, args: object) -> None:
        self._inputs.clear()
        self._outside = None

    def _end(self, owner: nn.Module, args: object, output: object) -> None:
        self.leave()

    def enter(self, tensor: torch.Tensor) -> torch.Tensor:
        """The input of a layer that cuts its output."""
        if self._outside is None and self.owner.training and drops(self.owner):
            self._begin_random(tensor.device)
        if not (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor
        for given, version, copied in self._inputs:
            if given is tensor and version == tensor._version:
                return copied
        copied = self.group.copy(tensor)
        self._inputs.append((tensor, tensor._version, copied))
        return copied

    def leave(self) -> None:
        """The layer that sums is next."""
        self._inputs.clear()
        if self._outside is None:
            return
        host, device = self._outside
        self._outside = None
        torch.set_rng_state(host)
        if device is not None:
            torch.get_device_module().set_rng_state(device)

    def _begin_random(self, device: torch.device) -> None:
        """Random numbers that follow from those outside, which all ranks have alike, and from the rank: so a forward
        that activation checkpointing repeats drops the same."""
        drawn = int(torch.randint(0, 1 << 62, (), device=HOST))
        seed = (drawn + (self.group.position + 1) * _GOLDEN) % (1 << 63)
        on_device = None if is_host(device) else torch.get_device_module()
        self._outside = torch.get_rng_state(), None if on_device is None else on_device.get_rng_state()
        torch.default_generator.manual_seed(seed)
        if on_device is not None:
            on_device.manual_seed(seed)

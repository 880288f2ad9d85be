"""Experts of a layer that run only where tokens go to them: which those are, and how ranks agree on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from zeroxide.device.placement import HOST
from zeroxide.distributed import Ranks
from zeroxide.errors import ModelError
from zeroxide.moe.exchange import Waiting
from zeroxide.moe.experts import Experts
from zeroxide.moe.hugging_face import fused_experts_in

__all__ = ["Routing", "experts_apart", "route_experts"]


class Routing:
    """Says which experts of one layer run: those with tokens on any of `ranks`, which gather their weights together.

    Every rank runs the layer equally often.
    """

    def __init__(self, experts: Experts, ranks: Ranks, name: str, waiting: Waiting) -> None:
        self._experts = experts
        self._ranks = ranks
        self._name = name
        self._waiting = waiting
        self._number = 0

    def used(self, counts: Sequence[int]) -> list[bool]:
        """Whether each expert runs, of which this rank has `counts` tokens. Raises RanksError when a rank is lost."""
        own = [count > 0 for count in counts]
        if self._ranks.world == 1:
            return own
        self._number += 1
        with self._waiting("routes to experts", self._name, self._number):
            rows = self._ranks.gather_rows(torch.tensor(own, dtype=torch.uint8, device=HOST))
        return [bool(each) for each in rows.amax(0).tolist()]

    def remove(self) -> None:
        """Every expert runs again."""
        self._experts.routing = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of the layer, in memory or in a file, is nobody's: all its experts run."""
        return type(None), ()


def experts_apart(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The experts of every layer of `module`, each a module of its own, with their names.

    Raises ModelError where there are none, and for fused experts, all of which are one parameter.
    """
    found = 0
    for name, each in fused_experts_in(module):
        raise ModelError(
            f"zeroxide.unrouted_experts: {name}, {type(each).__name__}, has all its experts in one parameter, of which "
            'no part is read or updated alone yet: use "update"',
            name=name,
        )
    for name, layer in module.named_modules():
        if isinstance(layer, Experts):
            for number, expert in layer.deepspeed_experts.items():
                found += 1
                yield f"{name}.deepspeed_experts.{number}", expert
    if not found:
        raise ModelError(
            f'zeroxide.unrouted_experts: {type(module).__name__} has no zeroxide.moe.MoE layer: use "update"'
        )


def route_experts(module: nn.Module, ranks: Ranks, waiting: Waiting) -> list[Routing]:
    """From here on experts of `module` run only where a token goes to them on any of `ranks`: of each layer what says
    so, until it is removed."""
    made = []
    for name, each in module.named_modules():
        if isinstance(each, Experts):
            each.routing = Routing(each, ranks, name, waiting)
            made.append(each.routing)
    return made

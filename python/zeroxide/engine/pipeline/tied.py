"""Weights that several stages have: one parameter in the model, a copy on each rank that uses it.

All copies begin with the values of the first, get the sum of all their gradients, and are updated alike; so they stay
equal to the bit. The sum is taken on the first of the ranks, in their order, a part of the parameter at a time, and
sent back. In the norm of a step the parameter counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from zeroxide.distributed import Ranks
from zeroxide.errors import ModelError
from zeroxide.parallel.pipe.link import StageLink
from zeroxide.parallel.pipe.message import TiedMessage, tied_parts
from zeroxide.zero.access.safe import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_set_full_fp32_param,
    safe_set_full_grad,
)
from zeroxide.zero.param import sharded_param_of
from zeroxide.zero.unit import Unit

__all__ = ["TiedWeights"]


@dataclass(frozen=True)
class _Tie:
    number: int
    """Among all ties of the pipeline."""
    name: str
    ranks: tuple[int, ...]
    param: nn.Parameter


class TiedWeights:
    """The ties that this rank has a part in.

    ties: by name, the ranks of the pipeline that have each parameter; the same on every rank.
    """

    def __init__(self, module: nn.Module, ties: dict[str, tuple[int, ...]], ranks: Ranks, link: StageLink) -> None:
        self._rank = ranks.rank
        self._link = link
        found = dict(module.named_parameters(remove_duplicate=False))
        self._ties: list[_Tie] = []
        for number, (name, holders) in enumerate(ties.items()):
            if self._rank not in holders:
                continue
            if name not in found:
                raise ModelError(
                    f"{name} is tied over ranks {', '.join(map(str, holders))} of the pipeline, and rank {self._rank} "
                    "has no parameter of that name",
                    name=name,
                )
            self._ties.append(_Tie(number, name, holders, found[name]))

    def counted_elsewhere(self, units: Sequence[Unit]) -> frozenset[tuple[int, int]]:
        """(unit, position) of trainable copies whose gradients the first of their ranks counts in a norm."""
        others = {id(tie.param) for tie in self._ties if self._rank != tie.ranks[0] and tie.param.requires_grad}
        return frozenset(
            (unit.index, position)
            for unit in units
            for position, param in enumerate(unit.params)
            if id(param) in others
        )

    def make_equal(self) -> None:
        """The values of the first rank of each tie become those of all."""
        for tie in self._ties:
            value = safe_get_full_fp32_param(tie.param)
            assert value is not None, "it is a parameter of the engine's"
            shared = self._from_first(tie, value, lambda values: values[0])
            assert shared is not None, "the first rank has one"
            if self._rank != tie.ranks[0]:
                safe_set_full_fp32_param(tie.param, shared)

    def sum_gradients(self) -> None:
        """Every copy's gradient becomes the sum of all; one that no copy has stays none."""
        for tie in self._ties:
            if not tie.param.requires_grad:
                continue
            sharded = sharded_param_of(tie.param)
            assert sharded is not None, "it is a parameter of the engine's"
            alone = sharded.context.ranks.world == 1 and sharded.context.whole.group is None
            if not alone:
                total = self._from_first(tie, safe_get_full_grad(tie.param), _sum)
                if total is not None:
                    safe_set_full_grad(tie.param, total)
                continue
            # Asked before a part of the sum is set.
            has_own = sharded.has_gradient(False)
            elements = sharded.shape.numel()
            parts = tied_parts(elements, alone=True)
            for part, start in enumerate(parts):
                # Nobody else has the part: it goes as soon as it is sent, or becomes the sum.
                own = sharded.read_own("grad", start, min(parts.step, elements - start)) if has_own else None
                total = self._from_first(tie, own, _sum, part)
                if total is not None:
                    sharded.write_own("grad", total, start)

    def _from_first(
        self,
        tie: _Tie,
        own: torch.Tensor | None,
        combine: Callable[[Sequence[torch.Tensor | None]], torch.Tensor | None],
        part: int = 0,
    ) -> torch.Tensor | None:
        """What the first rank makes of all ranks' tensors, on all of them. part: which of the parameter's it is."""
        first = tie.ranks[0]
        if self._rank != first:
            self._link.send(TiedMessage(tie.number, part, self._rank), first, own)
            del own
            # The first rank hears everybody before it answers, so that this waits for nobody who waits for it.
            self._link.drain()
            found: torch.Tensor | None = self._link.receive(TiedMessage(tie.number, part, first), first)
        else:
            others = [self._link.receive(TiedMessage(tie.number, part, rank), rank) for rank in tie.ranks[1:]]
            found = combine([own, *others])
            for rank in tie.ranks[1:]:
                self._link.send(TiedMessage(tie.number, part, first), rank, found)
        self._link.drain()
        return found


def _sum(values: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """In the first that is there."""
    total: torch.Tensor | None = None
    for each in values:
        if each is not None:
            total = each if total is None else total.add_(each)
    return total

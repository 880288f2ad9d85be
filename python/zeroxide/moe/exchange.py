"""Tokens to the ranks that have their experts, and back: an all-to-all that gradients pass the other way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from zeroxide.device.placement import HOST
from zeroxide.distributed import COMMS, Ranks
from zeroxide.moe.dispatch import dispatch

__all__ = ["ExpertExchange"]

Waiting = Callable[[str, str, int], AbstractContextManager[Any]]
"""What is told, in words that are the same on all ranks, while this one waits for others: kind, name and number."""


class ExpertExchange:
    """The ranks that have the experts of one layer, in the order of the experts: the first has the first ones.

    Every rank of them runs the layer equally often, forward and backward, with any number of tokens, also none.
    """

    def __init__(self, ranks: Ranks, position: int, name: str, waiting: Waiting) -> None:
        self.ranks = ranks
        self.position = position
        self.size = ranks.world
        self.name = name
        self.sent_bytes = 0
        """Bytes of tokens and their gradients that left this rank for others."""
        self._waiting = waiting
        self._number = 0

    def through(
        self,
        experts: Callable[[torch.Tensor, list[int]], torch.Tensor],
        rows: torch.Tensor,
        counts: Sequence[int],
    ) -> torch.Tensor:
        """What all experts make of `rows`, (rows, width), in the same order; `counts[e]` of them are of expert e.

        experts: this rank's, which are given the rows of each from all ranks, one expert after the other, and how many
        each has. Raises RanksError when a rank is lost.
        """
        arrived, expert, way_back = self.bring(rows, counts)
        order = expert.argsort(stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=HOST)
        number = len(counts) // self.size
        made = experts(dispatch(arrived, order, back[:, None]), torch.bincount(expert, minlength=number).tolist())
        return way_back(dispatch(made, back, order[:, None]))

    def bring(
        self, rows: torch.Tensor, counts: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """The rows of this rank's experts from all ranks, rank after rank; the expert of each, counted from this rank's
        first; and what takes as many rows back to where these came from. See `through`."""
        number = len(counts) // self.size
        leaving = torch.tensor(counts, dtype=torch.int64, device=HOST).view(self.size, number)
        arriving = torch.empty_like(leaving)
        self.exchange(arriving, leaving, [1] * self.size, [1] * self.size, "of counts")
        to, given = leaving.sum(1).tolist(), arriving.sum(1).tolist()
        arrived: torch.Tensor = _AllToAll.apply(rows, to, given, self)
        expert = torch.arange(number, device=HOST).repeat(self.size).repeat_interleave(arriving.view(-1))

        def way_back(made: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = _AllToAll.apply(made, given, to, self)
            return found

        return arrived, expert, way_back

    def __deepcopy__(self, _: Any) -> ExpertExchange:
        """Copies of a layer reach the same ranks."""
        return self

    def exchange(
        self, arriving: torch.Tensor, leaving: torch.Tensor, given: list[int], to: list[int], what: str
    ) -> None:
        """`to[r]` rows of `leaving` go to the rank at position r, and `given[r]` rows of `arriving` come from it."""
        self._number += 1
        width = leaving.nbytes // leaving.shape[0] if leaving.shape[0] else 0
        sent = width * (leaving.shape[0] - to[self.position])
        self.sent_bytes += sent
        logged = COMMS.begin("all_to_all", sent, self.size, what=what, unit=self.name) if COMMS.enabled else None
        with self._waiting(f"all-to-all {what}", self.name, self._number):
            self.carry(arriving, leaving, given, to)
        COMMS.end(logged)

    def carry(self, arriving: torch.Tensor, leaving: torch.Tensor, given: list[int], to: list[int]) -> None:
        """See `exchange`, which counts what this carries."""
        import torch.distributed as dist

        # As bytes: a group has no word for most dtypes.
        sizes = _scaled(given, arriving), _scaled(to, leaving)
        dist.all_to_all_single(_bytes(arriving), _bytes(leaving), *sizes, group=self.ranks.group)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1).view(torch.uint8)


def _scaled(rows: list[int], tensor: torch.Tensor) -> list[int]:
    """Numbers of rows in bytes."""
    width = tensor[0].numel() * tensor.itemsize if tensor.shape[0] else 0
    return [each * width for each in rows]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, to: list[int], given: list[int], exchange: ExpertExchange
    ) -> torch.Tensor:
        ctx.to, ctx.given, ctx.exchange = to, given, exchange
        arriving = rows.new_empty(sum(given), rows.shape[1])
        exchange.exchange(arriving, rows.contiguous(), given, to, "of tokens")
        return arriving

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        arriving = gradient.new_empty(sum(ctx.to), gradient.shape[1])
        ctx.exchange.exchange(arriving, gradient.contiguous(), ctx.to, ctx.given, "of gradients")
        return arriving, None, None, None

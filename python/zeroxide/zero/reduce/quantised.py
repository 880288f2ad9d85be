"""Gradients that travel as block-wise int4: within a group of ranks first, then across groups.

ZeRO++ (Wang et al. 2023). In the first hop every rank gives each rank of its group what that one's column sums, the
ranks with its place in all groups; each adds up, in fp32, what its group has for its column. In the second hop the
ranks of a column exchange these sums, so that across groups each slice travels once for a whole group. The rank's own
part is never quantised. Sums are taken in a fixed order: own first, then by rank.

Everything happens in place: an outgoing slice shrinks to its message where its gradients lie, and the sums of the first
hop to theirs. While the second hop of a unit is under way, the next unit makes its first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zeroxide import _core
from zeroxide.device.placement import DTYPE_NAMES, memory_at, spec
from zeroxide.distributed import Hops
from zeroxide.plan.plan import Plan
from zeroxide.zero.messages import Messages, Work
from zeroxide.zero.reduce.feedback import Residuals
from zeroxide.zero.reduce.gradient_reduction import CollectiveGradients
from zeroxide.zero.unit import Unit

__all__ = ["BITS", "QuantisedGradients"]

BITS = 4


@dataclass(slots=True)
class _Reduction:
    """A unit in one of its hops."""

    unit: Unit
    hops: Hops
    size: int
    """Elements of a slice."""
    column: list[int]
    """The slices that the ranks of this one's column sum, by group."""
    slices: torch.Tensor
    """What this rank sends, as bytes, by slice."""
    work: Work
    """The first hop, then the second."""


class QuantisedGradients(CollectiveGradients):
    """`CollectiveGradients` as int4.

    residuals: what quantising loses, None where that is not kept.
    """

    def __init__(
        self, core: _core.Offload, units: list[Unit], messages: Messages, dtype: torch.dtype, plan: Plan
    ) -> None:
        super().__init__(core, units, messages, dtype, kept=plan.grad)
        self.residuals: Residuals | None = None
        self._near: _Reduction | None = None
        """The unit in its first hop."""
        self._far: _Reduction | None = None
        """The unit in its second."""
        room = memory_at(*core.room("incoming"), torch.uint8)
        hops = plan.groups.gradient_hops()
        # As the plan counts it, for the largest unit: fp32 sums, then the messages of each hop.
        slice_numel = max((unit.layout_numel for unit in self.trainable), default=0) // plan.world
        sums, message = 4 * slice_numel * hops.far.size, _core.message_bytes(slice_numel, BITS)
        count = (hops.near.size - 1) * hops.far.size
        self._sums = room[:sums].view(torch.float32)
        self._from_near = room[sums : sums + count * message]
        self._from_far = room[sums + count * message : sums + (plan.world - 1) * message]

    def _begin_reduce(self, unit: Unit) -> None:
        if self._near is None and self._far is None and self._next == 0 and self.residuals is not None:
            self.residuals.begin_backward()
        self._advance()
        self.core.send(unit.index)
        groups, owners = unit.groups, unit.groups.owners()
        hops = groups.gradient_hops()
        size = unit.layout_numel // groups.world
        slices = memory_at(*self.core.outgoing(unit.index), torch.uint8).view(groups.world, -1)
        work = self.messages.work("all-to-all", unit)
        column = [owners.index(rank) for rank in hops.far.ranks]
        self._near = _Reduction(unit, hops, size, column, slices, work)
        message = _core.message_bytes(size, BITS)
        others = hops.near.others()
        outgoing = []
        for place, rank in others:
            for piece in (owners.index(each) for each in hops.column(place)):
                self._shrink(unit, piece, slices[piece], self.dtype)
                outgoing.append((rank, slices[piece, :message]))
        coming = self._from_near[: len(outgoing) * message].view(-1, hops.far.size, message)
        incoming = [(rank, each) for (_, rank), row in zip(others, coming, strict=True) for each in row]
        self.messages.start(work, incoming, outgoing)
        self.sent.reductions.within += message * len(outgoing)

    def _shrink(self, unit: Unit, piece: int, room: torch.Tensor, dtype: torch.dtype) -> None:
        """Quantises a slice in its room, of bytes."""
        kept = self.residuals
        if kept is None:
            _core.shrink_gradients(spec(room), DTYPE_NAMES[dtype])
        else:
            _core.shrink_gradients(
                spec(room), DTYPE_NAMES[dtype], spec(kept.of(unit, piece)), factor=kept.factor, beta=kept.beta
            )

    def _advance(self) -> None:
        """Ends the second hop of one unit, and begins that of the next."""
        self._end_far()
        reduction, self._near = self._near, None
        if reduction is None:
            return
        reduction.work.received()
        reduction.work.sent()
        sums = self._sums[: reduction.size * len(reduction.column)].view(len(reduction.column), -1)
        others = reduction.hops.near.others()
        message = _core.message_bytes(reduction.size, BITS)
        coming = self._from_near[: len(others) * len(reduction.column) * message].view(len(others), -1, message)
        by_rank = sorted(range(len(others)), key=lambda at: others[at][1])
        for row, piece in enumerate(reduction.column):
            # Exactly as this rank's gradients are.
            sums[row].copy_(reduction.slices[piece].view(self.dtype))
            for at in by_rank:
                _core.add_message(spec(sums[row]), spec(coming[at, row]))
        self._far = reduction
        if len(reduction.column) == 1:
            self._end_far()
        else:
            self._begin_far(reduction, sums, message)

    def _begin_far(self, reduction: _Reduction, sums: torch.Tensor, message: int) -> None:
        reduction.work = self.messages.work("all-to-all across groups", reduction.unit)
        others = reduction.hops.far.others()
        outgoing = []
        for group, rank in others:
            room = sums[group].view(torch.uint8)
            self._shrink(reduction.unit, reduction.column[group], room, torch.float32)
            outgoing.append((rank, room[:message]))
        coming = self._from_far[: len(others) * message].view(len(others), message)
        incoming = [(rank, each) for (_, rank), each in zip(others, coming, strict=True)]
        self.messages.start(reduction.work, incoming, outgoing)
        self.sent.reductions.across += message * len(outgoing)

    def _end_far(self) -> None:
        reduction, self._far = self._far, None
        if reduction is None:
            return
        far, unit = reduction.hops.far, reduction.unit
        own = self._sums[: reduction.size * far.size].view(far.size, -1)[far.position]
        if far.size > 1:
            reduction.work.received()
            reduction.work.sent()
            message = _core.message_bytes(reduction.size, BITS)
            others = far.others()
            for at in sorted(range(len(others)), key=lambda at: others[at][1]):
                _core.add_message(spec(own), spec(self._from_far[at * message : (at + 1) * message]))
        self.core.receive_sum(unit.index, spec(own))
        if unit.groups.replicate.size > 1:
            self._end_update()
            self._begin_update(unit)

    def _end_reduce(self) -> None:
        """Ends all reductions."""
        self._advance()
        self._end_far()

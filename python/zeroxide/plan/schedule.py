"""What a training step exchanges with the other ranks, found from the plan alone: nothing is allocated or sent.

So a job of a thousand ranks can be looked at on one machine before it is started.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zeroxide.plan.plan import Plan

__all__ = [
    "ONE_MICRO_BATCH",
    "Collective",
    "Passes",
    "collectives",
    "micro_batches",
    "sent_across_groups",
    "sent_bytes",
]

Passes = Sequence[tuple[bool, Sequence[int]]]
"""What a rank does in a step, in order: (whether it goes back, the numbers of the units that it uses; none for all).
Every backward reduces the gradients of all units."""

ONE_MICRO_BATCH: Passes = ((False, ()), (True, ()))
"""Forward and backward through all units."""


def micro_batches(count: int) -> Passes:
    """One after the other, each forward and backward."""
    return tuple(ONE_MICRO_BATCH) * count


@dataclass(frozen=True)
class Collective:
    """One collective of one rank. `sent` is the bytes that leave the rank for others, `across` those of them that leave
    its shard group."""

    phase: str
    kind: str
    unit: str
    sent: int
    across: int


def collectives(plan: Plan, passes: Passes = ONE_MICRO_BATCH) -> list[Collective]:
    """The collectives of a step of `passes`, in the order in which a rank begins them, when every module of the
    model runs once in a forward. Activation checkpointing changes nothing here.

    Between ranks of one host that share memory there are none but the gathers of weights at home on disk.
    """
    rows = plan.numbers.collectives(_plain(passes))
    return [Collective(phase, kind, plan.units[unit].name, *sent) for phase, kind, unit, *sent in rows]


def sent_bytes(plan: Plan, passes: Passes = ONE_MICRO_BATCH) -> int:
    """Bytes that leave a rank in such a step, what goes through shared memory included."""
    return plan.numbers.sent_bytes(_plain(passes))


def sent_across_groups(plan: Plan, passes: Passes = ONE_MICRO_BATCH) -> int:
    """Of `sent_bytes` those that leave the rank's shard group: none of weights, only of gradients."""
    return plan.numbers.across_bytes(_plain(passes))


def _plain(passes: Passes) -> list[tuple[bool, list[int]]]:
    return [(backward, list(units)) for backward, units in passes]

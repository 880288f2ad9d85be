"""What a training step exchanges with the other ranks, found from the plan alone: nothing is allocated or sent.

So a job of a thousand ranks can be looked at on one machine before it is started.
"""

from __future__ import annotations

from dataclasses import dataclass

from zeroxide.plan.plan import Plan

__all__ = ["Collective", "collectives", "sent_across_groups", "sent_bytes"]


@dataclass(frozen=True)
class Collective:
    """One collective of one rank. `sent` is the bytes that leave the rank for others, `across` those of them that leave
    its shard group."""

    phase: str
    kind: str
    unit: str
    sent: int
    across: int


def collectives(plan: Plan) -> list[Collective]:
    """The collectives of a step of one micro-batch, in the order in which a rank begins them, when every module of the
    model runs once in forward. Activation checkpointing changes nothing here.

    Between ranks of one host that share memory there are none but the gathers of weights at home on disk.
    """
    rows = plan.numbers.collectives()
    return [Collective(phase, kind, plan.units[unit].name, *sent) for phase, kind, unit, *sent in rows]


def sent_bytes(plan: Plan) -> int:
    """Bytes that leave a rank in such a step, what goes through shared memory included."""
    return plan.numbers.sent_bytes()


def sent_across_groups(plan: Plan) -> int:
    """Of `sent_bytes` those that leave the rank's shard group: none of weights, only of gradients."""
    return plan.numbers.across_bytes()

"""What a rank sends in a step of training, by kind: to the byte, and nothing left out.

Gradients of every micro-batch are reduced in its backward. A ring sends a tensor of S bytes over n ranks in
2 (n - 1) / n * S for an all-reduce; of an all-gather each rank's part goes to n - 1 others; a broadcast counts as the
tensor, on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from zeroxide.engine.on_paper.part import PaperPart
from zeroxide.engine.on_paper.passes import Given, StagePass
from zeroxide.errors import ConfigError
from zeroxide.parallel.pipe.message import tied_parts
from zeroxide.parallel.pipe.schedule import SCHEDULES, Action, Kind, passes_of, rank_of_stage
from zeroxide.plan.schedule import collectives

__all__ = ["KINDS", "Sent", "step_traffic"]

KINDS = ("weights", "gradients", "stages", "tied", "tokens", "tensor", "sequences", "norm", "small")
"""Weights that are gathered; gradients that are reduced; activations and their gradients from stage to stage; weights
that stages share; tokens to experts and back; partial sums of matrices; heads for tokens; the norm; and what ranks tell
one another to go on alike."""

_HEAD, _COUNT = 17, 8
"""Bytes of a norm (a sum, whether it is finite, the clipping), and of how many parameters have a gradient."""
_WORD = 8
_OF_WEIGHTS = ("all-gather", "all-gather across groups")


@dataclass(frozen=True)
class Sent:
    """Messages of one kind in a step."""

    kind: str
    op: str
    """"send", "all_gather", "all_reduce", "all_to_all" or "broadcast"."""
    count: int
    nbytes: int
    """That leave the rank."""


def step_traffic(
    part: PaperPart,
    order: tuple[Action, ...],
    passes: Mapping[int, StagePass],
    received: Given | None,
    micro_batches: int,
    batch: int,
    tokens: int,
) -> list[Sent]:
    """What the rank with `part` sends in a step of `micro_batches`, in which it follows `order`.

    passes: what a micro-batch takes in each of its stages. received: what its stages are given. batch, tokens:
    sequences of a micro-batch, and the tokens of each that it has.

    Raises ConfigError for what is not counted: weights in shards under a schedule that computes backward in halves.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for kind, op, count, nbytes in (
        *_state(part, order),
        *_stages(part, passes, received, micro_batches),
        *_tied(part),
        *_computing(part, passes, micro_batches),
        *_together(part, order, micro_batches, batch * tokens),
    ):
        entry = found.setdefault((kind, op), [0, 0])
        entry[0] += count
        entry[1] += nbytes
    rows = [Sent(kind, op, *each) for (kind, op), each in found.items() if each[0]]
    return sorted(rows, key=lambda each: (KINDS.index(each.kind), each.op))


_Row = tuple[str, str, int, int]


def _state(part: PaperPart, order: tuple[Action, ...]) -> Iterator[_Row]:
    name = "1f1b" if part.stages is None else part.stages.schedule
    if SCHEDULES[name].split and part.config.zero.stage == 3:
        raise ConfigError(
            f"pipeline.schedule: what {name} gathers of weights in shards is not counted, as its backward is in "
            "halves: plan it with zero_optimization.stage 1 or 2, or another schedule",
            path="pipeline.schedule",
        )
    for each in collectives(part.plan, passes_of(order, part.units_of)):
        yield "weights" if each.kind in _OF_WEIGHTS else "gradients", "send", 1, each.sent


def _stages(
    part: PaperPart, passes: Mapping[int, StagePass], received: Given | None, micro_batches: int
) -> Iterator[_Row]:
    if part.stages is None:
        return
    stages, here = part.stages, part.stages.stage_id

    def elsewhere(stage: int) -> bool:
        return rank_of_stage(stages.schedule, stage, stages.num_stages) != here

    for stage, each in passes.items():
        sizes = []
        if each.gives is not None and elsewhere(stage + 1):
            sizes.append(each.gives.nbytes)
        if stage and elsewhere(stage - 1):
            assert received is not None, "a stage before gives it"
            sizes.append(received.nbytes)
        for size in sizes:
            yield "stages", "send", micro_batches, micro_batches * size
            # Whether the structure is another one than the last time.
            yield "small", "send", micro_batches, micro_batches * _WORD


def _tied(part: PaperPart) -> Iterator[_Row]:
    plan, tp = part.plan, part.axes.tp
    ranks, fp32 = plan.groups.world, torch.float32.itemsize
    for tie in part.ties:
        if ranks > 1:
            # Whether there is a gradient, and before and after it is changed.
            yield "small", "all_gather", 3, 3 * (ranks - 1)
            # Each shard in its turn, and the sum.
            shards = plan.groups.shard.size
            yield "tied", "broadcast", shards * (shards > 1) + 1, (1 + (shards > 1)) * tie.numel * fp32
        if tp > 1:
            if tie.full != tie.numel:
                yield "tied", "all_gather", 1, tie.widest * fp32 * (tp - 1)
            yield "tied", "broadcast", 1, tie.full * fp32
        # The first of its ranks sums all, and tells each.
        messages = len(tie.ranks) - 1 if tie.first else 1
        parts = len(tied_parts(tie.full, alone=ranks == tp == 1))
        yield "tied", "send", messages * parts, messages * tie.full * fp32
        yield "small", "send", messages * parts, messages * parts * _WORD


def _computing(part: PaperPart, passes: Mapping[int, StagePass], micro_batches: int) -> Iterator[_Row]:
    for each in passes.values():
        for kind, op, counted in (
            ("tensor", "all_reduce", each.reduced),
            ("tensor", "all_gather", each.gathered),
            ("tokens", "all_to_all", each.carried.tokens),
            ("small", "all_to_all", each.carried.counts),
            ("sequences", "all_to_all", each.carried.sequences),
        ):
            yield kind, op, micro_batches * counted.count, micro_batches * counted.sent


def _together(part: PaperPart, order: tuple[Action, ...], micro_batches: int, positions: int) -> Iterator[_Row]:
    plan, axes, stages = part.plan, part.axes, part.stages
    ranks = plan.groups.world
    trainable = sum(entry.trainable for unit in plan.units for entry in unit.params)
    if ranks > 1:
        yield "norm", "all_gather", 1, (ranks - 1) * (_HEAD + trainable)
    if axes.pp * axes.tp > 1:
        yield "norm", "all_gather", 1, (axes.pp * axes.tp - 1) * (_HEAD + _COUNT)
    forwards = sum(each.kind is Kind.FORWARD for each in order)
    if axes.tp > 1:
        # Whether all have the same samples.
        yield "small", "all_gather", forwards, forwards * (axes.tp - 1) * 2 * _WORD
    if axes.sp > 1:
        # How long each part is, where in their sequences its tokens are, and how many of them the loss is of.
        told = micro_batches * (axes.sp - 1)
        yield "small", "all_gather", 2 * micro_batches, told * (4 + positions) * _WORD
        if part.is_last:
            yield "small", "all_gather", micro_batches, told * 2 * _WORD
    if stages is None:
        return
    world = axes.pp * axes.tp * ranks
    yield "small", "all_gather", 1, (world - 1) * 4 * _WORD
    single = torch.float32.itemsize
    if part.is_last and ranks > 1:
        yield "small", "all_gather", 1, (ranks - 1) * micro_batches * single
    yield "small", "all_gather", 1, (axes.pp - 1) * (micro_batches + 1) * single

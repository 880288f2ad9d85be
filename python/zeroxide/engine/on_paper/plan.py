"""A job of any size on paper: for each rank of a pipeline what it has and sends in a step, and how long it waits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from zeroxide.config import Config, Mesh
from zeroxide.engine.on_paper.part import PaperPart, axes_of
from zeroxide.engine.on_paper.passes import Given, StagePass, rehearse_part
from zeroxide.engine.on_paper.traffic import Sent, step_traffic
from zeroxide.errors import ConfigError
from zeroxide.parallel.pipe.row import find_row
from zeroxide.parallel.pipe.schedule import Action, Kind, Schedule, make_schedule, most_kept, simulate

__all__ = ["JobPlan", "RankPlan", "plan_job"]


@dataclass(frozen=True)
class RankPlan:
    """What the ranks with one part of the model have in common. Bytes are of each of them."""

    rank: int
    """Of the pipeline."""
    stages: tuple[int, ...]
    parameters: int
    """Elements of its part, before ZeRO shards it."""
    buckets: dict[str, int]
    """Bytes of state, as the engine's own plan counts them: "weights", "gradients", "optimizer", ..."""
    in_flight: int
    """Most micro-batches whose backward is outstanding."""
    activations: int
    """Most bytes of theirs at once, what travels to experts among them."""
    sent: tuple[Sent, ...]
    """In a step, by kind."""

    @property
    def held(self) -> int:
        """All bytes."""
        return sum(self.buckets.values()) + self.activations

    def sent_bytes(self, kind: str | None = None) -> int:
        """In a step, of one kind or of all."""
        return sum(each.nbytes for each in self.sent if kind in (None, each.kind))


@dataclass(frozen=True)
class JobPlan:
    """A job."""

    world: int
    axes: Mesh
    schedule: str
    micro_batches: int
    batch: int
    """Sequences in a micro-batch."""
    sequence: int
    """Tokens in each."""
    parameters: int
    """Of the whole model."""
    bubble: float
    """The part of the time in which a rank of the pipeline waits, where all stages take as long, backward twice as
    long as forward, and messages nothing."""
    ranks: tuple[RankPlan, ...]

    @property
    def tokens(self) -> int:
        """Of a step of the whole job."""
        return self.batch * self.sequence * self.micro_batches * self.axes.dp_replicate * self.axes.dp_shard


def plan_job(
    build: Callable[[], nn.Module],
    config: Config,
    world: int,
    sequence: int,
    prepare: Callable[[Any], None] = lambda model: None,
) -> JobPlan:
    """What `world` ranks with `config` take to train a Hugging Face model on `sequence` tokens a sequence.

    build: makes the model on the meta device, each time anew. prepare: what is done to it before it computes, as making
    it compute activations again. Nothing has memory, and no process group is made.

    Raises ConfigError and ModelError for what cannot be cut, and for what is not counted.
    """
    axes = axes_of(config, world)
    _check(config, axes, sequence)
    count = config.batch.gradient_accumulation_steps
    batch = config.batch.train_micro_batch_size_per_gpu or 1
    # Where blocks end is known without the parts of other axes.
    first = build()
    parameters = sum(each.numel() for each in first.parameters())
    row = find_row(first, None) if axes.pp > 1 else None
    schedule = _schedule(config, axes, count)
    known: dict[Any, dict[int, StagePass]] = {}
    received: Given | None = None
    ranks = []
    for rank in range(axes.pp):
        with ExitStack() as made:
            part = PaperPart(build(), config, world, rank, row, made)
            own = sum(each.numel() for each in part.module.parameters())
            buckets = dict(part.plan.buckets)
            signature = part.signature()
            if signature not in known:
                passes = rehearse_part(part, batch, sequence // axes.sp, received, prepare)
                known[signature] = passes
                received = next((each.gives for each in passes.values() if each.gives is not None), received)
            passes = dict(zip(part.own_stages, known[signature].values(), strict=True))
            order = schedule.orders[rank]
            kept = {stage: each.kept for stage, each in passes.items()}
            in_flight, activations = most_kept(order, kept, {stage: each.peak for stage, each in passes.items()})
            sent = step_traffic(part, order, passes, received, count, batch, sequence // axes.sp)
        ranks.append(RankPlan(rank, part.own_stages, own, buckets, in_flight, activations, tuple(sent)))
    bubble = simulate(schedule).bubble if axes.pp > 1 else 0.0
    return JobPlan(world, axes, schedule.name, count, batch, sequence, parameters, max(0.0, bubble), tuple(ranks))


def _check(config: Config, axes: Mesh, sequence: int) -> None:
    """Raises ConfigError for what is not counted."""
    if sequence % axes.sp:
        raise ConfigError(
            f"{sequence} tokens over {axes.sp} ranks that share a sequence: give a multiple",
            path="zeroxide.mesh.sp",
            expected=f"a divisor of {sequence}",
            got=str(axes.sp),
        )
    quantised = config.zero.quantized_weights or config.zero.quantized_gradients
    if quantised and axes.cuts_the_model:
        raise ConfigError(
            "zero_optimization.zero_quantized_weights and zero_quantized_gradients over parts of a model are not "
            "counted: leave them out",
            path="zero_optimization.zero_quantized_weights",
        )
    own = config.zeroxide
    if own.row_bytes is not None:
        raise ConfigError(
            "zeroxide.row_bytes over several axes is not counted: leave it out", path="zeroxide.row_bytes"
        )
    if own.accumulation_order != "batches":
        raise ConfigError(
            'zeroxide.accumulation_order: "layers" over several axes is not built: leave it out',
            path="zeroxide.accumulation_order",
        )


def _schedule(config: Config, axes: Mesh, count: int) -> Schedule:
    if axes.pp == 1:
        order = [Action(kind, 0, at) for at in range(count) for kind in (Kind.FORWARD, Kind.BACKWARD)]
        return Schedule("none", 1, 1, count, (tuple(order),))
    pipeline = config.pipeline
    assert pipeline is not None, "there are stages"
    return make_schedule(pipeline.schedule or "1f1b", axes.pp, pipeline.stages_per_rank or 1, count)

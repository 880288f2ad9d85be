"""Who computes what when: torch's schedules of a pipeline, as lists of actions for each rank.

The schedules are those of `torch.distributed.pipelining`, asked for their orders alone. What an action needs from
another stage follows from the action, so an order has no messages in it: whoever follows it receives before it computes
and sends after (`runner.py`).

Stages are numbered along the model. A rank has one of them, or `chunks`: every `ranks`-th ("loop"), or one on the way
there and one on the way back ("v", where rank 0 has the first and the last).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType, SimpleNamespace
from typing import Any

from zeroxide.errors import ConfigError

__all__ = [
    "SCHEDULES",
    "Action",
    "Kind",
    "Schedule",
    "Timeline",
    "make_schedule",
    "most_kept",
    "passes_of",
    "rank_of_stage",
    "simulate",
    "stages_of",
]


class Kind(Enum):
    """What is computed: all of backward, or its two halves apart."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"


@dataclass(frozen=True, slots=True)
class Action:
    """One micro-batch through one stage, forward or back."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind.value} of micro-batch {self.micro_batch} in stage {self.stage}"


@dataclass(frozen=True)
class _Known:
    """A schedule: torch's class for it, where its stages are, and whether it computes backward in halves."""

    torch_name: str
    style: str = "loop"
    split: bool = False
    chunks: int | None = None
    """Stages of a rank, where that is no choice."""


SCHEDULES: Mapping[str, _Known] = {
    "gpipe": _Known("ScheduleGPipe", chunks=1),
    "1f1b": _Known("Schedule1F1B", chunks=1),
    "looped_bfs": _Known("ScheduleLoopedBFS"),
    "interleaved_1f1b": _Known("ScheduleInterleaved1F1B"),
    "interleaved_zero_bubble": _Known("ScheduleInterleavedZeroBubble", split=True),
    "zbv_zero_bubble": _Known("ScheduleZBVZeroBubble", style="v", split=True, chunks=2),
    "dualpipe_v": _Known("ScheduleDualPipeV", style="v", split=True, chunks=2),
}
"""By the names that the config has for them."""


@dataclass(frozen=True)
class Schedule:
    """The order of every rank of one pipeline for one optimizer step."""

    name: str
    ranks: int
    chunks: int
    micro_batches: int
    orders: tuple[tuple[Action, ...], ...]

    @property
    def stages(self) -> int:
        """Stages of the model."""
        return self.ranks * self.chunks


def stages_of(name: str, rank: int, ranks: int, chunks: int) -> tuple[int, ...]:
    """The stages of a rank, ascending."""
    if SCHEDULES[name].style == "v":
        return rank, 2 * ranks - 1 - rank
    return tuple(range(rank, ranks * chunks, ranks))


def rank_of_stage(name: str, stage: int, ranks: int) -> int:
    """The rank that has a stage."""
    if SCHEDULES[name].style == "v" and stage >= ranks:
        return 2 * ranks - 1 - stage
    return stage % ranks


def check_schedule(name: str, chunks: int) -> None:
    """Raises ConfigError for a schedule that there is not, or that does not take so many stages a rank."""
    path = "pipeline.schedule"
    known = SCHEDULES.get(name)
    if known is None:
        names = ", ".join(SCHEDULES)
        raise ConfigError(f"{path}: expected one of {names}, got {name!r}", path=path, expected=names, got=repr(name))
    if known.chunks is not None and chunks != known.chunks:
        raise ConfigError(
            f"{path} = {name} has {known.chunks} stages a rank, and pipeline.stages_per_rank is {chunks}",
            path="pipeline.stages_per_rank",
            expected=str(known.chunks),
            got=str(chunks),
        )


def make_schedule(name: str, ranks: int, chunks: int, micro_batches: int) -> Schedule:
    """torch's schedule for `micro_batches` over `ranks` with `chunks` stages each.

    Raises ConfigError for what torch's schedule does not take, in its words.
    """
    check_schedule(name, chunks)
    try:
        orders = _torch_orders(name, ranks, chunks, micro_batches)
    except ValueError as error:
        raise ConfigError(
            f"pipeline.schedule = {name} does not take {micro_batches} micro-batches over {ranks} ranks: {error}",
            path="pipeline.schedule",
        ) from None
    made = Schedule(name, ranks, chunks, micro_batches, orders)
    simulate(made)
    return made


def _torch_orders(name: str, ranks: int, chunks: int, micro_batches: int) -> tuple[tuple[Action, ...], ...]:
    from torch.distributed.pipelining import schedules

    if name == "gpipe":
        found = schedules.ScheduleGPipe(_stand_ins(name, 0, ranks, 1)[0], micro_batches)._get_pipeline_order()
        assert found is not None
    elif name == "1f1b":
        found = {rank: _one_f_one_b(schedules, rank, ranks, micro_batches) for rank in range(ranks)}
    else:
        made = getattr(schedules, SCHEDULES[name].torch_name)
        found = made(_stand_ins(name, 0, ranks, chunks), micro_batches).pipeline_order
    return tuple(tuple(_actions(found[rank], micro_batches)) for rank in range(ranks))


def _one_f_one_b(schedules: Any, rank: int, ranks: int, micro_batches: int) -> list[Any]:
    """torch's own list for a single stage a rank leaves out the last rank's first forward (2.15)."""
    warmup = min(micro_batches, ranks - 1 - rank)
    rest = micro_batches - warmup
    order: list[Any] = schedules._get_1f1b_rank_ops(
        1, ranks, warmup, rest, micro_batches - rest, rank, lambda step: rank, lambda step: rank
    )
    return order


def _stand_ins(name: str, rank: int, ranks: int, chunks: int) -> list[Any]:
    """What torch's schedules ask of stages when they make their orders."""
    count = ranks * chunks
    return [
        SimpleNamespace(
            stage_index=stage,
            num_stages=count,
            group=None,
            group_rank=rank,
            group_size=ranks,
            is_first=stage == 0,
            is_last=stage == count - 1,
            has_backward=True,
            submod=None,
            device=None,
            stage_index_to_group_rank={each: rank_of_stage(name, each, ranks) for each in range(count)},
        )
        for stage in stages_of(name, rank, ranks, chunks)
    ]


def _actions(found: Sequence[Any], micro_batches: int) -> list[Action]:
    """The actions that compute, those that torch runs overlapped one after the other.

    Where there are fewer micro-batches than the shape of a schedule needs, torch goes through more, which are left out.
    """
    kinds = {kind.value: kind for kind in Kind}
    actions = []
    for each in found:
        for one in () if each is None else each.sub_actions or (each,):
            kind = kinds.get(one.computation_type.value)
            if kind is not None and one.microbatch_index < micro_batches:
                actions.append(Action(kind, one.stage_index, one.microbatch_index))
    return actions


@dataclass(frozen=True)
class Timeline:
    """When everything happens if actions take what they are said to take, and messages nothing."""

    ends: Mapping[Action, float]
    busy: tuple[float, ...]
    """Of each rank."""
    waiting: tuple[int, ...]
    """Of each rank, the most micro-batches of its stages whose backward was outstanding at once."""

    @property
    def makespan(self) -> float:
        """From the first action to the end of the last."""
        return max(self.ends.values())

    @property
    def bubble(self) -> float:
        """The part of the ranks' time in which they wait."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.makespan)


def simulate(schedule: Schedule, cost: Mapping[Kind, float] | None = None) -> Timeline:
    """Follows all orders at once. `cost`: of each kind of action, in any unit; backward is twice forward if None.

    Raises ValueError for an order that cannot be followed to its end, or leaves something out.
    """
    cost = cost or {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0, Kind.BACKWARD_INPUT: 1.0, Kind.BACKWARD_WEIGHT: 1.0}
    ends: dict[Action, float] = {}
    free = [0.0] * schedule.ranks
    busy = [0.0] * schedule.ranks
    at = [0] * schedule.ranks
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(schedule.orders):
            while at[rank] < len(order):
                action = order[at[rank]]
                ready = _ready(action, schedule.stages, ends)
                if ready is None:
                    break
                free[rank] = ends[action] = max(free[rank], ready) + cost[action.kind]
                busy[rank] += cost[action.kind]
                at[rank] += 1
                moved = True
    _check_complete(schedule, ends, at)
    return Timeline(ends, tuple(busy), tuple(map(_most_waiting, schedule.orders)))


def _ready(action: Action, stages: int, ends: Mapping[Action, float]) -> float | None:
    """When what the action needs is there; None while it is not."""
    stage, micro_batch = action.stage, action.micro_batch
    if action.kind is Kind.FORWARD:
        return 0.0 if stage == 0 else ends.get(Action(Kind.FORWARD, stage - 1, micro_batch))
    own = Kind.BACKWARD_INPUT if action.kind is Kind.BACKWARD_WEIGHT else Kind.FORWARD
    needed = [ends.get(Action(own, stage, micro_batch))]
    if action.kind is not Kind.BACKWARD_WEIGHT and stage < stages - 1:
        after = (Action(kind, stage + 1, micro_batch) for kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT))
        needed.append(next((ends[each] for each in after if each in ends), None))
    found = [each for each in needed if each is not None]
    return max(found) if len(found) == len(needed) else None


def _check_complete(schedule: Schedule, ends: Mapping[Action, float], at: Sequence[int]) -> None:
    for rank, order in enumerate(schedule.orders):
        if at[rank] < len(order):
            raise ValueError(f"{schedule.name}: rank {rank} waits for ever before {order[at[rank]]}")
        if len(set(order)) != len(order):
            raise ValueError(f"{schedule.name}: rank {rank} does something twice")
    for stage in range(schedule.stages):
        for micro_batch in range(schedule.micro_batches):
            found = {kind for kind in Kind if Action(kind, stage, micro_batch) in ends}
            if found not in (
                {Kind.FORWARD, Kind.BACKWARD},
                {Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT},
            ):
                raise ValueError(f"{schedule.name}: stage {stage} does {found} with micro-batch {micro_batch}")


def passes_of(order: Sequence[Action], units_of: Callable[[int], Sequence[int]]) -> list[tuple[bool, Sequence[int]]]:
    """What `zeroxide.plan.schedule.Passes` has of a rank's order, whose stages use the units of `units_of`.

    Of a backward in halves the second counts, which reduces its gradients.
    """
    return [
        (action.kind is not Kind.FORWARD, units_of(action.stage))
        for action in order
        if action.kind is not Kind.BACKWARD_INPUT
    ]


_NOTHING: Mapping[int, int] = MappingProxyType({})


def most_kept(
    order: Sequence[Action], kept: Mapping[int, int] = _NOTHING, peak: Mapping[int, int] = _NOTHING
) -> tuple[int, int]:
    """(micro-batches, bytes): the most whose backward is outstanding at once in a rank's order, each counted in every
    stage of the rank, and the most bytes of activations at any time.

    kept, peak: of each of its stages, the bytes of a micro-batch from its forward to its backward, and the most while
    one of the two runs, these among them.
    """
    outstanding: dict[tuple[int, int], int] = {}
    count = most = 0
    for action in order:
        key = action.stage, action.micro_batch
        outstanding[key] = kept.get(action.stage, 0)
        count = max(count, len(outstanding))
        most = max(most, sum(outstanding.values()) - outstanding[key] + peak.get(action.stage, 0))
        if action.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT):
            del outstanding[key]
    return count, most


def _most_waiting(order: Sequence[Action]) -> int:
    now = most = 0
    for action in order:
        now += {Kind.FORWARD: 1, Kind.BACKWARD_INPUT: 0}.get(action.kind, -1)
        most = max(most, now)
    return most

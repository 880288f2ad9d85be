"""Which ranks share a sequence, under the names of DeepSpeed's `parallel_state_sp`: what `initialize` calls an `mpu`.

Ranks are cut into sequence groups of neighbours. Those with the same place in their groups are a data group: each of
them has other samples. ZeRO shards over all of them. A process has one such state, which ends with torch's default
process group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from zeroxide.config import Mesh
from zeroxide.distributed import ProcessMesh
from zeroxide.errors import RanksError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "SequenceParallelState",
    "current_state",
    "destroy_sequence_parallel",
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_sequence_data_parallel_group",
    "get_sequence_data_parallel_rank",
    "get_sequence_data_parallel_world_size",
    "get_sequence_parallel_group",
    "get_sequence_parallel_rank",
    "get_sequence_parallel_world_size",
    "initialize_sequence_parallel",
    "known_state",
    "sequence_parallel_is_initialized",
]


@dataclass(eq=False)
class SequenceParallelState:
    """The groups of one rank; an `mpu` that `initialize` takes."""

    sequence_group: ProcessGroup
    """Ranks that share sequences, in the order of their parts."""
    sequence_ranks: tuple[int, ...]
    data_group: ProcessGroup
    """Ranks that have the same part of other sequences."""
    sequence_data_group: ProcessGroup
    """Both together: all ranks over whose tokens a loss is averaged."""
    default_group: Any
    """The process group of all ranks that they were made in."""
    asked: bool = False
    """Whether somebody has asked for the sequence group, to exchange something in it."""

    def get_sequence_parallel_group(self) -> ProcessGroup:
        """Ranks that share sequences."""
        self.asked = True
        return self.sequence_group

    def get_sequence_parallel_world_size(self) -> int:
        """How many parts a sequence has."""
        return len(self.sequence_ranks)

    def get_sequence_parallel_rank(self) -> int:
        """Which part of its sequences this rank has."""
        return dist.get_rank(self.sequence_group)

    def get_data_parallel_group(self) -> ProcessGroup:
        """Ranks that have the same part of other sequences."""
        return self.data_group

    def get_data_parallel_world_size(self) -> int:
        """How many sequence groups there are."""
        return dist.get_world_size(self.data_group)

    def get_data_parallel_rank(self) -> int:
        """Which of the sequence groups this rank is in."""
        return dist.get_rank(self.data_group)

    def get_sequence_data_parallel_group(self) -> ProcessGroup:
        """Ranks over whose tokens a loss is averaged, and over which ZeRO shards."""
        return self.sequence_data_group

    def get_sequence_data_parallel_world_size(self) -> int:
        """How many ranks `get_sequence_data_parallel_group` has."""
        return dist.get_world_size(self.sequence_data_group)

    def get_sequence_data_parallel_rank(self) -> int:
        """This rank's number in `get_sequence_data_parallel_group`."""
        return dist.get_rank(self.sequence_data_group)


_state: SequenceParallelState | None = None


def current_state() -> SequenceParallelState | None:
    """The state of this process; None before `initialize_sequence_parallel`, and after its process group has ended."""
    if _state is None or not dist.is_initialized() or dist.group.WORLD is not _state.default_group:
        return None
    return _state


def initialize_sequence_parallel(
    sequence_parallel_size: int, *, mesh: ProcessMesh | None = None
) -> SequenceParallelState:
    """Cuts all ranks into groups of `sequence_parallel_size` neighbours that share sequences, and returns the state.

    mesh: whose axis `sp` says which ranks share a sequence; without it they are neighbours. Every rank calls it. Called
    again with the same groups it returns what is there.

    Raises RanksError without a process group, where the size does not divide the ranks, and for other groups than
    those that are there.
    """
    global _state
    if not dist.is_available() or not dist.is_initialized():
        raise RanksError(
            "sequence parallelism needs a process group: call zeroxide.distributed.init_distributed (or torch's "
            "init_process_group) in every rank first"
        )
    world, rank = dist.get_world_size(), dist.get_rank()
    if mesh is None:
        size = sequence_parallel_size
        if size < 1 or world % size:
            fitting = [each for each in range(1, world + 1) if world % each == 0]
            raise RanksError(
                f"sequence_parallel_size = {size!r} does not divide the {world} ranks: use one of {fitting}"
            )
        sequences = [tuple(range(first, first + size)) for first in range(0, world, size)]
        data = [tuple(range(place, world, size)) for place in range(size)]
        both = [tuple(range(world))]
    else:
        if mesh.sizes["sp"] != sequence_parallel_size or mesh.world != world:
            raise RanksError(
                f"sequence_parallel_size = {sequence_parallel_size} of {world} ranks contradicts {mesh}: they are one "
                "number"
            )
        axes = Mesh(**mesh.sizes, ep=mesh.ep)
        every = [ProcessMesh(each, world, axes) for each in range(world)]
        sequences = _distinct(each.group("sp").ranks for each in every)
        data = _distinct(each.batch_group().ranks for each in every)
        both = _distinct(each.loss_group().ranks for each in every)
    mine = next(group for group in sequences if rank in group)
    state = current_state()
    if state is not None:
        if state.sequence_ranks != mine:
            raise RanksError(
                f"rank {rank} shares sequences with ranks {list(state.sequence_ranks)} already, and is asked to share "
                f"them with {list(mine)}: a process has one sequence group; destroy_sequence_parallel() ends it"
            )
        return state
    _state = SequenceParallelState(
        sequence_group=_made(sequences, rank),
        sequence_ranks=mine,
        data_group=_made(data, rank),
        sequence_data_group=_made(both, rank),
        default_group=dist.group.WORLD,
    )
    return _state


def _distinct(groups: Any) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(groups))


def _made(groups: list[tuple[int, ...]], rank: int) -> ProcessGroup:
    """The one of `groups` that has this rank. Every rank takes part in making each."""
    made = {ranks: dist.new_group(list(ranks)) for ranks in groups}
    mine: Any = next(group for ranks, group in made.items() if rank in ranks)
    found: ProcessGroup = mine
    return found


def destroy_sequence_parallel() -> None:
    """Ends the sequence groups of this process; all ranks call it. Does nothing where there are none."""
    global _state
    state, _state = current_state(), None
    if state is not None:
        for group in (state.sequence_group, state.data_group, state.sequence_data_group):
            dist.destroy_process_group(group)


def sequence_parallel_is_initialized() -> bool:
    """Whether there are sequence groups."""
    return current_state() is not None


def known_state() -> SequenceParallelState:
    """The state of this process. Raises RanksError where there are no sequence groups."""
    state = current_state()
    if state is None:
        raise RanksError("there are no sequence groups: call initialize_sequence_parallel(size) in every rank first")
    return state


def get_sequence_parallel_group() -> ProcessGroup:
    """Ranks that share sequences with this one. Raises RanksError where there are no sequence groups."""
    return known_state().get_sequence_parallel_group()


def get_sequence_parallel_world_size() -> int:
    """How many parts a sequence has; 1 where there are no sequence groups."""
    state = current_state()
    return 1 if state is None else state.get_sequence_parallel_world_size()


def get_sequence_parallel_rank() -> int:
    """Which part of its sequences this rank has; 0 where there are no sequence groups."""
    state = current_state()
    return 0 if state is None else state.get_sequence_parallel_rank()


def get_data_parallel_group() -> ProcessGroup:
    """Ranks that have the same part of other sequences. Raises RanksError where there are no sequence groups."""
    return known_state().get_data_parallel_group()


def get_data_parallel_world_size() -> int:
    """How many sequence groups there are. Raises RanksError where there are none."""
    return known_state().get_data_parallel_world_size()


def get_data_parallel_rank() -> int:
    """Which of the sequence groups this rank is in. Raises RanksError where there are none."""
    return known_state().get_data_parallel_rank()


def get_sequence_data_parallel_group() -> ProcessGroup:
    """Ranks over whose tokens a loss is averaged. Raises RanksError where there are no sequence groups."""
    return known_state().get_sequence_data_parallel_group()


def get_sequence_data_parallel_world_size() -> int:
    """How many ranks those are. Raises RanksError where there are no sequence groups."""
    return known_state().get_sequence_data_parallel_world_size()


def get_sequence_data_parallel_rank() -> int:
    """This rank's number among them. Raises RanksError where there are no sequence groups."""
    return known_state().get_sequence_data_parallel_rank()

"""Ranks as points of a grid with named axes, under the names that DeepSpeed's topologies have.

`zeroxide.distributed.mesh` is what the engine goes by; these classes answer scripts that ask in DeepSpeed's words. Both
count ranks through the last axis first.
"""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from zeroxide.errors import RanksError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["PipeDataParallelTopology", "PipeModelDataParallelTopology", "PipelineParallelGrid", "ProcessTopology"]


def _coordinates(axes: Sequence[str]) -> Any:
    """A class of named tuples with a place along each axis."""
    return namedtuple("ProcessCoord", list(axes))


class ProcessTopology:
    """A grid of `dims` ranks along `axes`, row-major. Raises RanksError for axes and sizes that do not go together."""

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        if len(axes) != len(dims) or len(set(axes)) != len(axes) or not all(size >= 1 for size in dims):
            raise RanksError(f"topology: expected a size of at least 1 for each axis, got {axes} and {dims}")
        self.axes = list(axes)
        self.dims = list(dims)
        self.ProcessCoord: Any = _coordinates(axes)
        self.mapping: dict[Any, int] = {
            self.ProcessCoord(*places): rank for rank, places in enumerate(product(*[range(size) for size in dims]))
        }
        self._coords = list(self.mapping)

    def get_rank(self, **coord_kwargs: int) -> int:
        """The rank at a place along every axis. Raises RanksError for a place that is not there."""
        if sorted(coord_kwargs) != sorted(self.axes):
            raise RanksError(f"topology: expected a place along {self.axes}, got {coord_kwargs}")
        found = self.mapping.get(self.ProcessCoord(**coord_kwargs))
        if found is None:
            raise RanksError(
                f"topology: {coord_kwargs} is not in a grid of {dict(zip(self.axes, self.dims, strict=True))}"
            )
        return found

    def get_axis_names(self) -> list[str]:
        """The axes, the slowest first."""
        return self.axes

    def get_dim(self, axis: str) -> int:
        """The size of an axis; 0 for one that is not there."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def get_coord(self, rank: int) -> Any:
        """Where a rank is: a named tuple of its places. Raises RanksError for a rank that is not there."""
        if not 0 <= rank < len(self._coords):
            raise RanksError(f"topology: rank: expected 0 to {len(self._coords) - 1}, got {rank}")
        return self._coords[rank]

    def get_rank_repr(
        self,
        rank: int,
        omit_axes: Sequence[str] = ("data", "pipe"),
        inner_sep: str = "_",
        outer_sep: str = "-",
    ) -> str:
        """Where a rank is, in words for file names: "model_00"."""
        shown = [axis for axis in self.axes if axis not in omit_axes]
        return outer_sep.join(f"{axis}{inner_sep}{getattr(self.get_coord(rank), axis):02d}" for axis in shown)

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """The ranks that differ along `axis` alone, a list for each place along the others."""
        if axis not in self.axes:
            return []
        others = [each for each in self.axes if each != axis]
        rows = []
        for places in product(*(range(self.get_dim(each)) for each in others)):
            fixed = dict(zip(others, places, strict=True))
            rows.append([self.get_rank(**fixed, **{axis: place}) for place in range(self.get_dim(axis))])
        return rows

    def filter_match(self, **filter_kwargs: int) -> list[int]:
        """The ranks at these places, ascending."""
        return [
            rank
            for rank, coord in enumerate(self._coords)
            if all(getattr(coord, axis) == place for axis, place in filter_kwargs.items())
        ]

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """The ranks at place `idx` along one axis, ascending."""
        return self.filter_match(**{axis: idx})

    def world_size(self) -> int:
        """How many ranks there are."""
        return math.prod(self.dims)

    def __str__(self) -> str:
        return str(self.mapping)


class PipeDataParallelTopology(ProcessTopology):
    """Stages of a pipeline, each with neighbours that have other samples."""

    def __init__(self, num_pp: int, num_dp: int) -> None:
        super().__init__(axes=["pipe", "data"], dims=[num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """Stages, replicas with other samples, and parts of every matrix among neighbours."""

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        super().__init__(axes=["pipe", "data", "model"], dims=[num_pp, num_dp, num_mp])


class PipelineParallelGrid:
    """What a rank is in a topology, and the process groups along its axes; DeepSpeed's `mpu` of a pipeline.

    Without `topology` all ranks of `process_group` are one pipeline. Every rank makes it at the same time, since groups
    are made. Raises RanksError when the topology is not of as many ranks as there are.
    """

    def __init__(self, topology: ProcessTopology | None = None, process_group: ProcessGroup | None = None) -> None:
        import torch.distributed as dist

        running = dist.is_initialized()
        self.global_rank = dist.get_rank(process_group) if running else 0
        self.world_size = dist.get_world_size(process_group) if running else 1
        self._topo = topology or PipeDataParallelTopology(self.world_size, 1)
        if self._topo.world_size() != self.world_size:
            sizes = " * ".join(f"{axis} {size}" for axis, size in zip(self._topo.axes, self._topo.dims, strict=True))
            raise RanksError(
                f"topology: {sizes} = {self._topo.world_size()}, and there are {self.world_size} ranks: make their "
                f"product {self.world_size}"
            )
        self.pipe_parallel_size = max(self._topo.get_dim("pipe"), 1)
        self.data_parallel_size = max(self._topo.get_dim("data"), 1)
        self.model_parallel_size = max(self._topo.get_dim("model"), 1)
        self.slice_parallel_size = self.model_parallel_size
        coord = self._topo.get_coord(self.global_rank)
        self.stage_id: int = getattr(coord, "pipe", 0)
        self.data_parallel_id: int = getattr(coord, "data", 0)
        self.is_first_stage = self.stage_id == 0
        self.is_last_stage = self.stage_id == self.pipe_parallel_size - 1
        self._groups: dict[str, tuple[list[int], ProcessGroup | None]] = {}
        for axis in ("pipe", "data", "model"):
            for row in self._topo.get_axis_comm_lists(axis) or [[rank] for rank in range(self.world_size)]:
                made = dist.new_group(row, backend="gloo") if running and len(row) > 1 else None
                if self.global_rank in row:
                    self._groups[axis] = row, made if isinstance(made, dist.ProcessGroup) else None

    def topology(self) -> ProcessTopology:
        """The topology."""
        return self._topo

    def get_stage_id(self) -> int:
        """The stage of this rank."""
        return self.stage_id

    def get_data_parallel_id(self) -> int:
        """Which pipeline of several this rank is part of."""
        return self.data_parallel_id

    def stage_to_global(self, stage_id: int, **kwargs: int) -> int:
        """The rank of another stage at this rank's place along the other axes."""
        here = self._topo.get_coord(self.global_rank)
        return self._topo.get_rank(**{**dict(zip(self._topo.axes, here, strict=True)), **kwargs, "pipe": stage_id})

    def get_global_rank(self) -> int:
        """This rank."""
        return self.global_rank

    def get_pipe_parallel_rank(self) -> int:
        """The stage of this rank."""
        return self.stage_id

    def get_pipe_parallel_world_size(self) -> int:
        """Stages."""
        return self.pipe_parallel_size

    def get_pipe_parallel_group(self) -> ProcessGroup | None:
        """The ranks of this pipeline; None for one."""
        return self._groups["pipe"][1]

    def get_data_parallel_rank(self) -> int:
        """This rank among those of its stage."""
        return self.data_parallel_id

    def get_data_parallel_world_size(self) -> int:
        """Ranks of a stage that have other samples."""
        return self.data_parallel_size

    def get_data_parallel_group(self) -> ProcessGroup | None:
        """The ranks of this stage that have other samples; None for one."""
        return self._groups["data"][1]

    def get_model_parallel_rank(self) -> int:
        """This rank among those that have parts of the same matrices."""
        return int(getattr(self._topo.get_coord(self.global_rank), "model", 0))

    def get_model_parallel_world_size(self) -> int:
        """Ranks that have parts of the same matrices."""
        return self.model_parallel_size

    def get_model_parallel_group(self) -> ProcessGroup | None:
        """The ranks that have parts of the same matrices; None for one."""
        return self._groups["model"][1]

    def get_slice_parallel_rank(self) -> int:
        """The same as `get_model_parallel_rank`."""
        return self.get_model_parallel_rank()

    def get_slice_parallel_world_size(self) -> int:
        """The same as `get_model_parallel_world_size`."""
        return self.slice_parallel_size

    def get_slice_parallel_group(self) -> ProcessGroup | None:
        """The same as `get_model_parallel_group`."""
        return self.get_model_parallel_group()

"""Which ranks do what together: the named axes of the process mesh, and the groups that follow from them.

All ranks form one grid. Its axes, from the one along which neighbours are furthest apart to the one along which they
are next to one another, are

- `pp`: stages of a pipeline, each with other layers;
- `dp_replicate`: replicas, each with other samples and the same shards;
- `dp_shard`: members of a shard group, each with other samples and another shard of everything;
- `sp`: members of a sequence group, each with another part of the same samples and another shard of everything;
- `tp`: members of a tensor group, each with a part of every matrix.

`ep` is no axis of the grid: experts are spread over `ep` neighbours of a shard group, so it divides `dp_shard` * `sp`.
The order is that of torchtitan and of DeepSpeed's topologies: what exchanges most has the nearest neighbours.

Only the data axes can be larger than 1 so far (`zeroxide.config` refuses the others by name). A unit of the model knows
none of this: it has a shard group and a replicate group, and nothing below the engine knows more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zeroxide.errors import RanksError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from zeroxide.config import Mesh
    from zeroxide.distributed.collectives import Ranks

__all__ = ["AXES", "Group", "Hops", "ProcessMesh", "UnitGroups"]

AXES = ("pp", "dp_replicate", "dp_shard", "sp", "tp")
"""Axes of the grid; ranks count through the last one first."""


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that do something together, in the order in which they number their parts, and which one this is."""

    ranks: tuple[int, ...] = (0,)
    position: int = 0

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self.ranks)

    def others(self) -> list[tuple[int, int]]:
        """(position, rank) of the other members, beginning with the next: not all turn to the same one first."""
        turned = ((self.position + step) % self.size for step in range(1, self.size))
        return [(position, self.ranks[position]) for position in turned]


@dataclass(frozen=True, slots=True)
class Hops:
    """The two hops in which integers travel among ranks: those near one another are a group, ranks in a row; those far
    from one another have the same place, one in each group."""

    near: Group = Group()
    far: Group = Group()
    ranks: tuple[int, ...] = (0,)
    """All of them."""

    @classmethod
    def among(cls, ranks: tuple[int, ...], position: int, near: int) -> Hops:
        """The hops among `ranks`, of which this one is at `position`, in groups of `near`."""
        first, place = position - position % near, position % near
        return cls(Group(ranks[first : first + near], place), Group(ranks[place::near], position // near), ranks)

    def column(self, place: int) -> tuple[int, ...]:
        """The ranks at one place of each group."""
        return self.ranks[place :: self.near.size]


@dataclass(frozen=True, slots=True)
class UnitGroups:
    """What a unit of the model knows of the mesh.

    Its elements are cut into one slice for each rank that trains it. A shard is as many slices in a row as there are
    replicas, and each replica answers for one of them: it takes that slice's part of a norm, saves it, and sums its
    gradients. So the same sums are taken over the same elements however the ranks are grouped.
    """

    shard: Group = Group()
    """Ranks that each keep one shard of the unit, in the order of the shards."""
    replicate: Group = Group()
    """Ranks that keep the same shard as this one."""
    everyone: tuple[int, ...] = (0,)
    """All ranks that train the unit, ascending: the order in which their gradients are summed."""
    secondary: int = 0
    """Ranks in a row of a shard group that are a group for integers that travel; 0 for all of it."""
    places: tuple[tuple[int, ...], ...] = ()
    """Of a unit of experts, the ranks that train each of the units in its place, `everyone` among them, by where the
    experts are; none for other units."""

    @property
    def world(self) -> int:
        """Ranks that train the unit."""
        return len(self.everyone)

    @property
    def replicated(self) -> bool:
        """Whether every rank keeps all of the unit."""
        return self.shard.size == 1 and self.world > 1

    @property
    def rank(self) -> int:
        """Position of this rank among those that train the unit."""
        return self.everyone.index(self.shard.ranks[self.shard.position])

    @property
    def near(self) -> int:
        """Ranks in a group: those between which bytes cost least."""
        return self.secondary or self.shard.size

    def weight_hops(self) -> Hops:
        """How weights travel as integers: within the shard group."""
        return Hops.among(self.shard.ranks, self.shard.position, self.near)

    def gradient_hops(self) -> Hops:
        """How gradients travel as integers: over all ranks."""
        return Hops.among(self.everyone, self.rank, self.near)

    def owners(self) -> list[int]:
        """The rank that answers for each slice of the unit, in the order of the slices."""
        shards, replicas = self.shard.size, self.replicate.size
        return [self.everyone[piece % replicas * shards + piece // replicas] for piece in range(self.world)]


class ProcessMesh:
    """The grid of `world` ranks, seen from one of them; without `axes` they are one shard group.

    Raises RanksError, naming the numbers, when the axes do not multiply to `world`, or `ep` does not divide the axes
    that it is spread over.
    """

    def __init__(self, rank: int, world: int, axes: Mesh | None = None) -> None:
        self.rank = rank
        self.world = world
        self.sizes: dict[str, int] = {name: 1 if axes is None else getattr(axes, name) for name in AXES}
        self.ep = 1 if axes is None else axes.ep
        if axes is None:
            self.sizes["dp_shard"] = world
        product = 1
        for size in self.sizes.values():
            product *= size
        if product != world:
            shown = " * ".join(f"{name} {size}" for name, size in self.sizes.items() if size > 1) or "all of size 1"
            raise RanksError(
                f"the axes of the mesh are {shown} = {product}, and there are {world} ranks: make their product {world}"
            )
        if not 0 <= rank < world:
            raise RanksError(f"rank: expected 0 to {world - 1}, got {rank}")
        spread = self.sizes["dp_shard"] * self.sizes["sp"]
        if spread % self.ep:
            raise RanksError(f"ep = {self.ep} does not divide dp_shard * sp = {spread}, over which experts are spread")

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in {**self.sizes, "ep": self.ep}.items() if size > 1)
        return f"ProcessMesh(rank {self.rank} of {self.world}{', ' if sizes else ''}{sizes})"

    def coordinates(self, rank: int | None = None) -> dict[str, int]:
        """Where a rank, or this one, is along each axis."""
        left = self.rank if rank is None else rank
        found: dict[str, int] = {}
        for name in reversed(AXES):
            left, found[name] = divmod(left, self.sizes[name])
        return {name: found[name] for name in AXES}

    def rank_at(self, coordinates: Mapping[str, int]) -> int:
        """The rank at a place along each axis; an axis that is not named counts as 0."""
        rank = 0
        for name in AXES:
            rank = rank * self.sizes[name] + coordinates.get(name, 0)
        return rank

    def group(self, *axes: str) -> Group:
        """The ranks that differ from this one along `axes` alone, ascending."""
        mine = self.coordinates()
        fixed = {name: place for name, place in mine.items() if name not in axes}
        ranks = [rank for rank in range(self.world) if fixed.items() <= self.coordinates(rank).items()]
        return Group(tuple(ranks), ranks.index(self.rank))

    def partition(self, *axes: str) -> list[tuple[int, ...]]:
        """All ranks in groups that differ along `axes` alone; groups by their first rank, ranks ascending."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            place = self.coordinates(rank)
            groups.setdefault(tuple(place[name] for name in AXES if name not in axes), []).append(rank)
        return [tuple(group) for group in groups.values()]

    def batch_group(self) -> Group:
        """Ranks that take different samples."""
        return self.group("dp_replicate", "dp_shard")

    def loss_group(self) -> Group:
        """Ranks over whose tokens a loss is averaged."""
        return self.group("dp_replicate", "dp_shard", "sp")

    def unit_groups(self, *, sharded: bool = True, experts: bool = False, secondary: int = 0) -> UnitGroups:
        """The groups of a unit.

        sharded: whether its members keep shards of it (stages 1 to 3), or each keeps all (stage 0).
        experts: whether it has the experts of one of `ep` places instead of what all ranks have.
        secondary: see `UnitGroups`.
        """
        everyone = self.loss_group().ranks
        places: tuple[tuple[int, ...], ...] = ()
        shards = self.sizes["dp_shard"] * self.sizes["sp"]
        if experts:
            # Neighbours have different experts: those with the same are `ep` apart.
            places = tuple(everyone[place :: self.ep] for place in range(self.ep))
            everyone = places[everyone.index(self.rank) % self.ep]
            shards //= self.ep
        if not sharded:
            shards = 1
        at = everyone.index(self.rank)
        first = at - at % shards
        return UnitGroups(
            Group(everyone[first : first + shards], at % shards),
            Group(everyone[at % shards :: shards], at // shards),
            everyone,
            secondary,
            places,
        )

    def expert_group(self) -> Group:
        """Ranks among which a token finds all experts."""
        everyone = self.loss_group()
        first = everyone.position - everyone.position % self.ep
        return Group(everyone.ranks[first : first + self.ep], everyone.position % self.ep)

    def expert_groups(self) -> list[tuple[int, ...]]:
        """All ranks in such groups."""
        return [
            everyone[first : first + self.ep]
            for everyone in self.partition("dp_replicate", "dp_shard", "sp")
            for first in range(0, len(everyone), self.ep)
        ]

    def device_mesh(self, ranks: Ranks) -> DeviceMesh | None:
        """torch's picture of the grid, for tensors in host memory: the axes larger than 1, or `dp_shard` alone.

        For what takes a `DeviceMesh`, such as DTensor. Every rank calls it; groups along an axis that is not all ranks
        are made anew. None for a single rank without a process group.
        """
        if ranks.group is None:
            return None
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh

        names = tuple(name for name in AXES if self.sizes[name] > 1) or ("dp_shard",)
        grid = torch.arange(self.world, device="cpu").view([self.sizes[name] for name in names])
        if len(names) == 1:
            return DeviceMesh.from_group(ranks.group, "cpu", mesh_dim_names=names)
        mine = []
        for axis, name in enumerate(names):
            for row in grid.movedim(axis, -1).reshape(-1, self.sizes[name]).tolist():
                made = dist.new_group(row, backend="gloo")
                if isinstance(made, dist.ProcessGroup):
                    mine.append(made)
        return DeviceMesh.from_group(mine, "cpu", mesh=grid, mesh_dim_names=names)

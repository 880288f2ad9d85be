"""The process mesh: where ranks are, and which groups they form. The oracle is a grid of ranks cut by torch."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from zeroxide.config import Mesh
from zeroxide.distributed import Job, Ranks
from zeroxide.distributed.mesh import AXES, ProcessMesh
from zeroxide.errors import RanksError
from zeroxide.zero.reduce.norm import agree_on_norm

SHAPES = [
    Mesh(dp_shard=6),
    Mesh(dp_replicate=2, dp_shard=2),
    Mesh(dp_replicate=3, dp_shard=4),
    Mesh(pp=2, dp_replicate=2, dp_shard=3, sp=2, tp=2),
    Mesh(dp_shard=4, sp=2, tp=3, ep=8),
    Mesh(pp=3, dp_replicate=2, dp_shard=4, ep=2),
]


def grid_of(axes: Mesh) -> torch.Tensor:
    sizes = [getattr(axes, name) for name in AXES]
    return torch.arange(math.prod(sizes)).view(sizes)


def along(grid: torch.Tensor, rank: int, axes: tuple[str, ...]) -> list[int]:
    """The ranks of the grid that share a rank's place on every axis but `axes`."""
    place = (grid == rank).nonzero()[0].tolist()
    index = tuple(slice(None) if name in axes else at for name, at in zip(AXES, place, strict=True))
    return grid[index].flatten().tolist()


@pytest.mark.parametrize("axes", SHAPES, ids=str)
def test_places_and_groups_are_those_of_the_grid(axes):
    # Catches: axes counted in another order, a group along another axis, a position that is not this rank's.
    grid = grid_of(axes)
    for rank in range(grid.numel()):
        mesh = ProcessMesh(rank, grid.numel(), axes)
        place = (grid == rank).nonzero()[0].tolist()
        assert mesh.coordinates() == dict(zip(AXES, place, strict=True))
        assert mesh.rank_at(mesh.coordinates()) == rank
        named = [[each] for each in AXES] + [["dp_replicate", "dp_shard"], ["dp_shard", "sp"], ["pp", "tp"]]
        for names in named:
            group = mesh.group(*names)
            assert list(group.ranks) == along(grid, rank, tuple(names)), names
            assert group.ranks[group.position] == rank
            assert [other for _, other in group.others()] == [
                group.ranks[(group.position + step) % group.size] for step in range(1, group.size)
            ]
        assert list(mesh.batch_group().ranks) == along(grid, rank, ("dp_replicate", "dp_shard"))
        assert list(mesh.loss_group().ranks) == along(grid, rank, ("dp_replicate", "dp_shard", "sp"))


@pytest.mark.parametrize("axes", SHAPES, ids=str)
def test_shard_and_replicate_groups_of_a_unit(axes):
    # Catches: groups that overlap or leave a rank out, members that see different groups, a slice with two owners.
    grid = grid_of(axes)
    for rank in range(grid.numel()):
        found = ProcessMesh(rank, grid.numel(), axes).unit_groups()
        assert list(found.shard.ranks) == along(grid, rank, ("dp_shard", "sp"))
        assert list(found.replicate.ranks) == along(grid, rank, ("dp_replicate",))
        assert list(found.everyone) == along(grid, rank, ("dp_replicate", "dp_shard", "sp"))
        assert found.everyone[found.rank] == rank
        assert found.shard.ranks[found.shard.position] == found.replicate.ranks[found.replicate.position] == rank
        assert not found.replicated
        # Each shard is cut into as many slices as it has replicas, and each of these owns one.
        owners = found.owners()
        assert sorted(owners) == sorted(found.everyone)
        replicas = found.replicate.size
        first = found.shard.position * replicas
        assert owners[first : first + replicas] == list(found.replicate.ranks)
        # Where every rank keeps everything, each is a shard group of its own, and owns the slice of its number.
        whole = ProcessMesh(rank, grid.numel(), axes).unit_groups(sharded=False)
        assert (whole.shard.ranks, whole.replicate.ranks) == ((rank,), found.everyone)
        assert whole.owners() == list(found.everyone)
        assert whole.replicated == (len(found.everyone) > 1)


@pytest.mark.parametrize("axes", [each for each in SHAPES if each.ep > 1], ids=str)
def test_experts_are_spread_over_neighbours(axes):
    # Catches: two ranks of one expert group with the same experts, a shard group of experts that mixes different ones.
    world = grid_of(axes).numel()
    meshes = [ProcessMesh(rank, world, axes) for rank in range(world)]
    for mesh in meshes:
        group = mesh.expert_group()
        assert group.size == axes.ep
        assert set(group.ranks) <= set(mesh.unit_groups().shard.ranks), "experts are spread within a shard group"
        same = mesh.unit_groups(experts=True)
        assert mesh.rank in same.everyone
        assert len(same.everyone) * axes.ep == mesh.loss_group().size
        assert same.shard.size * same.replicate.size == len(same.everyone)
        for one, other in itertools.combinations(same.everyone, 2):
            assert meshes[one].expert_group().position == meshes[other].expert_group().position
        others = [meshes[rank].unit_groups(experts=True).everyone for rank in group.ranks]
        assert sorted(itertools.chain(*others)) == list(mesh.loss_group().ranks), "together they are all ranks"


def test_one_process_without_a_process_group_is_a_mesh():
    mesh = ProcessMesh(0, 1)
    groups = mesh.unit_groups()
    assert (groups.shard.ranks, groups.replicate.ranks, groups.world) == ((0,), (0,), 1)
    assert not groups.replicated
    assert mesh.coordinates() == dict.fromkeys(AXES, 0)


def test_axes_that_do_not_multiply_to_the_ranks_are_refused():
    with pytest.raises(RanksError) as caught:
        ProcessMesh(0, 8, Mesh(dp_replicate=2, dp_shard=3, tp=2))
    assert str(caught.value) == (
        "the axes of the mesh are dp_replicate 2 * dp_shard 3 * tp 2 = 12, and there are 8 ranks: make their product 8"
    )
    with pytest.raises(RanksError, match="all of size 1 = 1, and there are 2 ranks"):
        ProcessMesh(0, 2, Mesh())
    with pytest.raises(RanksError, match=r"ep = 4 does not divide dp_shard \* sp = 6"):
        ProcessMesh(0, 6, Mesh(dp_shard=6, ep=4))
    with pytest.raises(RanksError, match="expected 0 to 3, got 4"):
        ProcessMesh(4, 4)


class FourRanks:
    """Ranks whose parts of a norm are given: what each would send, row after row."""

    rank, world = 0, 4

    def __init__(self, parts: list[float]) -> None:
        self.parts = parts

    def gather_rows(self, payload: torch.Tensor) -> torch.Tensor:
        rows = [bytearray(payload.numpy().tobytes()) for _ in self.parts]
        for row, part in zip(rows, self.parts, strict=True):
            struct.pack_into("<d", row, 0, part)
        return torch.stack([torch.frombuffer(row, dtype=torch.uint8) for row in rows])


class OneGradient:
    """A core with one parameter."""

    def grad_norm(self) -> tuple[float, bool, int]:
        return 0.0, False, 1

    def accumulated(self) -> bytes:
        return b"\1"

    def set_accumulated(self, _: bytes) -> None: ...

    def finish(self) -> None: ...


@pytest.mark.parametrize(("axes", "expected"), [(Mesh(dp_shard=4), 0.0), (Mesh(dp_replicate=2, dp_shard=2), 1.0)])
def test_the_parts_of_a_norm_are_added_in_the_order_of_the_slices(axes, expected):
    # In doubles 1e16 + 1 is 1e16. Ranks 0, 2, 1, 3 have the slices of two by two. Catches: the order of the ranks.
    groups = ProcessMesh(0, 4, axes).unit_groups()
    job = Job(Ranks(), ProcessMesh(0, 1), FourRanks([1e16, 1.0, -1e16, 0.0]), Ranks(), Ranks(), Ranks())
    found = agree_on_norm(OneGradient(), job, groups, Silent())
    assert found == (expected, False, 1)


def test_the_norm_is_over_all_parts_of_the_model():
    # Four parts, each of one rank. Catches: a norm of one part, which clips each by another factor; a sum of counts
    # that counts this part's gradient for all.
    job = Job(Ranks(), ProcessMesh(0, 1), Ranks(), FourRanks([1.0, 2.0, 4.0, 8.0]), Ranks(), Ranks())
    assert agree_on_norm(OneGradient(), job, ProcessMesh(0, 1).unit_groups(), Silent()) == (15.0, False, 4)


class Silent:
    """A watch that nobody looks at."""

    @contextmanager
    def waiting(self, *_: object) -> Iterator[None]:
        yield

"""The ranks of a job, and those of them that an engine's parts live on."""

from __future__ import annotations

from dataclasses import dataclass

from zeroxide.distributed.collectives import Ranks
from zeroxide.distributed.mesh import ProcessMesh
from zeroxide.distributed.process_group import split

__all__ = ["Job", "split_job"]


@dataclass(frozen=True, slots=True)
class Job:
    """This process among all, and in the groups that the mesh makes of them.

    An engine lives on `ranks`: it plans, gathers, reduces and saves one part of the model as if there were no others.
    What the parts must have in common, such as the norm, is exchanged between `parts`.
    """

    world: Ranks
    """All ranks."""
    mesh: ProcessMesh
    """All ranks by the axes along which they differ."""
    ranks: Ranks
    """Those that have this rank's part of the model, along `dp_replicate`, `dp_shard` and `sp`."""
    parts: Ranks
    """Those that have the other parts of the model in the same place, along `pp` and `tp`."""
    tensor: Ranks
    """Those that compute a part of every matrix, along `tp`; where the model computes, tensors travel between them."""
    stages: Ranks
    """Those that have the other stages of a pipeline for the same samples, along `pp`."""

    def groups(self) -> tuple[Ranks, ...]:
        """The groups that have collectives of their own: those of more ranks than one."""
        every = (self.ranks, self.parts, self.tensor, self.stages)
        return tuple({id(each): each for each in every if each.world > 1}.values())

    def close(self) -> None:
        """Destroys the process groups that `split_job` made."""
        for each in self.groups():
            if each is not self.world:
                each.close()


def split_job(world: Ranks, mesh: ProcessMesh) -> Job:
    """The groups of `mesh`. Called by all ranks; raises RanksError when one is lost meanwhile."""
    made: list[Ranks] = []
    try:
        made.append(split(world, mesh.partition("dp_replicate", "dp_shard", "sp")))
        made.append(split(world, mesh.partition("pp", "tp")))
        # Activations travel from where they are: a group for tensors in host memory is not enough beside a device.
        on_device = world.backend is not None and "nccl" in world.backend
        alike = mesh.sizes["pp"] == 1 and not on_device
        backend = world.backend if on_device and world.backend else "gloo"
        made.append(made[1] if alike else split(world, mesh.partition("tp"), backend))
        made.append(made[1] if mesh.sizes["tp"] == 1 else split(world, mesh.partition("pp")))
    except BaseException:
        for each in made:
            if each is not world:
                each.close()
        raise
    return Job(world, mesh, *made)

"""The ranks of a job as one of them sees them, and the few collectives that everything else starts from.

torch is imported where it is used: a single rank needs none of it here.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zeroxide.distributed.comms_log import COMMS
from zeroxide.errors import RanksError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

__all__ = ["Ranks", "all_gather_single"]


def all_gather_single(output: torch.Tensor, given: torch.Tensor, group: ProcessGroup | None = None, **more: Any) -> Any:
    """`output` becomes the concatenation of every rank's `given`, in rank order; same dtype, numel x ranks."""
    import torch.distributed as dist

    # torch 2.13 gave all_gather_into_tensor this name and warns about the old one.
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return call(output, given, group=group, **more)


@dataclass(slots=True, eq=False)
class Ranks:
    """This process's place among the ranks of a data-parallel job. `Ranks()` is a single one without a group.

    Every collective below is called by all ranks in the same order. Objects travel as JSON, never as pickles.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Rank among those of this host, from 0."""
    local_world: int = 1
    """Ranks on this host."""
    group: ProcessGroup | None = None
    """All ranks, for tensors in host memory; None for a single rank that needs no group."""
    owned: bool = False
    """Whether `close` destroys the default process group, because `start` made it."""
    backend: str | None = None
    """What torch calls the group's backend: "gloo", "cpu:gloo,cuda:nccl", "fake"."""
    same_host: bool = True
    """Whether all ranks share hostname, boot, and pid, user and network namespaces."""
    same_network: bool = True
    """Whether all ranks share one network namespace, so that 127.0.0.1 is the same interface to all of them."""
    shares_memory: bool = True
    """Whether, besides, each rank may open the anonymous memory of every other: same user, and nothing forbids it."""
    lost: str | None = None
    """Why the other ranks can no longer be relied on, in one line; set by the watch."""
    explain: Callable[[], RanksError | None] | None = None
    """Waits a moment for the watch to find out why a collective failed; set by the watch."""
    own_group: bool = False
    """Whether `group` is one that was made beside the default group, which takes no tensors in host memory."""
    within: Ranks | None = None
    """The ranks that these are a part of, see `zeroxide.distributed.split`; None for all of the job."""
    members: tuple[int, ...] | None = None
    """The numbers of these ranks `within` those; None for all of the job."""
    process: int = field(default_factory=os.getpid)
    """The process that the groups' threads live in."""

    @property
    def alone(self) -> bool:
        """Whether there is nobody to talk to: a single rank, or torch's fake group, where nobody answers."""
        return self.world == 1 or self.backend == "fake"

    def number(self, rank: int) -> int:
        """What one of these ranks is called in the job."""
        return rank if self.members is None else self.members[rank]

    def barrier(self) -> None:
        """Returns once every rank has called it. Raises RanksError when a rank is lost meanwhile."""
        if not self.alone:
            import torch

            # gloo's own barrier names ranks only in its debug mode; a gather fails as soon as a peer is gone.
            self.gather_rows(torch.zeros(1, dtype=torch.uint8, device="cpu"), "a barrier")

    def gather_objects(self, value: Any) -> list[Any]:
        """What every rank gave, by rank. `value` is anything that JSON can hold; tuples come back as lists.

        Raises RanksError when a rank is lost meanwhile.
        """
        if self.alone:
            return [json.loads(json.dumps(value)) for _ in range(self.world)]
        import torch

        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.gather_rows(torch.tensor([payload.numel()], device="cpu"), "exchanging objects").flatten().tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device="cpu")
        padded[: payload.numel()] = payload
        rows = self.gather_rows(padded, "exchanging objects")
        return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes, strict=True)]

    def broadcast_tensor(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Overwrites `tensor`, contiguous and in host memory, with rank `source`'s: one shape and dtype, any, on all.

        Returns it. Raises RanksError when a rank is lost meanwhile.
        """
        if not 0 <= source < self.world:
            raise ValueError(f"source: expected 0 to {self.world - 1}, got {source}")
        if not self.alone and tensor.numel():
            import torch
            import torch.distributed as dist

            assert self.group is not None
            # As bytes: a group has no word for most dtypes.
            raw = tensor.detach().view(-1).view(torch.uint8)
            logged = COMMS.begin("broadcast", raw.nbytes, self.world) if COMMS.enabled else None
            try:
                dist.broadcast(raw, dist.get_global_rank(self.group, source), group=self.group)
            except RuntimeError as error:
                raise self.broken("a broadcast", error) from error
            COMMS.end(logged)
        return tensor

    def gather_rows(self, tensor: torch.Tensor, what: str = "a gather") -> torch.Tensor:
        """[world, numel]: every rank's `tensor`, which has the same numel and dtype on all."""
        import torch

        flat = tensor.reshape(-1)
        rows = torch.empty(self.world * flat.numel(), dtype=flat.dtype, device="cpu")
        logged = None
        if COMMS.enabled:
            logged = COMMS.begin("all_gather", flat.nbytes * (self.world - 1), self.world, what="of small values")
        try:
            all_gather_single(rows, flat, group=self.group)
        except RuntimeError as error:
            raise self.broken(what, error) from error
        COMMS.end(logged)
        return rows.reshape(self.world, flat.numel())

    def broken(self, what: str, error: RuntimeError) -> RanksError:
        """The error of a collective that has failed: what the watch knows of it, else torch's first line."""
        found = self.explain() if self.explain is not None else None
        if found is not None:
            return found
        return RanksError(
            f"rank {self.rank}: {what} among {self.world} ranks failed: {first_line(error)}; another rank has probably "
            "ended: look at what each of them printed last"
        )

    def close(self) -> None:
        """Destroys the process groups that `start` made, and no other. Calling it again does nothing.

        With a lost rank they are left to the end of the process, since destroying them waits for that rank; in a forked
        child to the parent, since it would wait for threads that are not there.
        """
        if os.getpid() != self.process:
            return
        # `start` registers it for the end of the process.
        atexit.unregister(self.close)
        owned, own_group, group = self.owned, self.own_group, self.group
        self.owned = self.own_group = False
        if self.lost is None and (owned or own_group):
            import torch.distributed as dist

            if own_group and group is not None:
                dist.destroy_process_group(group)
            if owned and dist.is_initialized():
                dist.destroy_process_group()
            self.group = None


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, without torch's C++ stack, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__

"""The memory of the ranks of one host, each of which reads and writes that of the others."""

from __future__ import annotations

from zeroxide import _core
from zeroxide.distributed import Ranks
from zeroxide.plan.plan import Plan

__all__ = ["connect"]


def connect(core: _core.Offload, plan: Plan, ranks: Ranks) -> None:
    """Makes the shared memory of all ranks one, where the plan has any. Every rank calls it before weights are filled.

    Raises RanksError when another rank's memory cannot be reached.
    """
    if plan.world == 1 or plan.transport != "shared":
        return
    handles = ranks.gather_objects(core.segment_handle())
    try:
        core.join([(int(pid), int(descriptor)) for pid, descriptor in handles])
    finally:
        # Nobody closes what another is still opening.
        ranks.barrier()

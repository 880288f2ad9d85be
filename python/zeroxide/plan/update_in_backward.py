"""Whether backward updates a unit as soon as its gradients are complete, and whether such an update may be taken back.

`EarlyPlan` is what became of `zeroxide.update_in_backward`: what is asked for and cannot be is refused, and what is
left to the plan is decided by bytes on disk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zeroxide.config import Config
from zeroxide.device.placement import is_host
from zeroxide.distributed import Ranks
from zeroxide.errors import ConfigError
from zeroxide.plan.speculation import decides_late, speculation_problem

__all__ = ["EarlyPlan", "early_problem", "plan_early_updates"]


@dataclass(frozen=True)
class EarlyPlan:
    """When units are updated."""

    updates: bool = False
    """Inside of backward, where a step does."""
    speculates: bool = False
    """Before it is known whether the step clips or is left out, so that an update may be taken back."""
    chooses: bool = False
    """Each step by itself: whether it speculates is decided by how many of the last ones clipped."""
    problem: str | None = None
    """Why updates wait for the step although "adaptive" is asked for; None where they do not, or it is not."""

    def after(self, saved: int) -> EarlyPlan:
        """What is left of it if a step that speculates and does not clip takes `saved` bytes less on disk."""
        if not self.chooses or saved > 0:
            return self
        return EarlyPlan(problem="speculating saves no byte on disk where gradients wait in host memory, or most do")


def plan_early_updates(config: Config, ranks: Ranks, device: torch.device) -> EarlyPlan:
    """What the config asks for. Raises ConfigError where it says true and that cannot be."""
    asked = config.zeroxide.update_in_backward
    if asked is False:
        return EarlyPlan()
    late = decides_late(config)
    problem = early_problem(config, ranks, device)
    if asked == "adaptive":
        if problem is None and config.zeroxide.row_bytes is not None:
            problem = "row_bytes cuts matrices whose blocks may be complete only when backward ends"
        if problem is not None:
            return EarlyPlan(problem=problem)
        return EarlyPlan(updates=True, speculates=late, chooses=late)
    if problem is not None:
        raise ConfigError(
            f"zeroxide.update_in_backward: {problem}; or set update_in_backward to false",
            path="zeroxide.update_in_backward",
            expected="false",
            got="true",
        )
    return EarlyPlan(updates=True, speculates=late)


def early_problem(config: Config, ranks: Ranks, device: torch.device) -> str | None:
    """Why backward cannot update: a step must know all gradients first, or others have a part in them."""
    mesh = config.mesh
    if not config.batch.managed_gradient_accumulation:
        return (
            "managed_gradient_accumulation false leaves open during backward whether a step follows: leave it true, or "
            "say so with set_gradient_accumulation_boundary"
        )
    if config.zeroxide.accumulation_order != "batches":
        return 'accumulation_order "layers" is not built for it yet: use "batches"'
    if config.zeroxide.unrouted_experts == "lazy":
        return 'unrouted_experts "lazy" makes up for missed steps between backward and step: use "skip" or "update"'
    if ranks.world > 1 or (mesh is not None and max(mesh.pp, mesh.tp, mesh.sp, mesh.ep) > 1):
        return "several ranks must agree on a step first, and it is built for one rank"
    if not is_host(device):
        return f"the model computes on {device}, and it is built for models that compute in host memory"
    return speculation_problem(config)

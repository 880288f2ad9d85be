"""What an engine needs of a model that is cut into stages, however that was done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from zeroxide.plan.plan import Plan

__all__ = ["PipelineStages", "units_of"]


class PipelineStages:
    """One rank's stages of a model."""

    num_stages: int
    """Ranks of the pipeline."""
    stages_per_rank: int
    stage_id: int
    """This rank in the pipeline."""
    own_stages: tuple[int, ...]
    """This rank's stages of all `total_stages`, ascending."""
    schedule: str
    """Which of `SCHEDULES` the stages are laid out for."""
    partition_method: str
    loss_fn: Callable[..., Any] | None

    @property
    def module(self) -> nn.Module:
        """What has this rank's parameters, by the names that they have in the model before it was cut."""
        raise NotImplementedError

    @property
    def total_stages(self) -> int:
        """Stages of all ranks."""
        return self.num_stages * self.stages_per_rank

    def arguments(self, stage: int, received: Any, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What `module` is called with next, to run one of this rank's stages. Raises DataError for a batch that does
        not fit."""
        raise NotImplementedError

    def loss_of(self, outputs: Any, batch: Any) -> Any:
        """The loss of a micro-batch, on the last stage."""
        raise NotImplementedError

    def logits_of(self, outputs: Any) -> Any:
        """What `eval_batch` calls logits, of what the last stage gave."""
        return outputs

    def needs_batches(self) -> bool:
        """Whether this rank takes batches of its own from the data."""
        raise NotImplementedError

    def shared_of(self, batch: Any) -> Any:
        """What of a batch must be the same on all ranks of the pipeline that take batches."""
        return batch

    def bounds(self) -> list[int]:
        """Where the model is cut: the first layer or block of every stage, and how many there are."""
        raise NotImplementedError

    def uses(self, stage: int, name: str) -> bool:
        """Whether one of this rank's stages uses its parameter `name`."""
        raise NotImplementedError

    def facts(self) -> dict[str, str | int | float | None]:
        """What all ranks of a pipeline must have alike."""
        return {
            "stages.bounds": ", ".join(map(str, self.bounds())),
            "stages.ranks": self.num_stages,
            "stages.schedule": self.schedule,
            "stages.ties": "; ".join(f"{name} on {ranks}" for name, ranks in sorted(self.ties().items())),
        }

    def ties(self) -> dict[str, tuple[int, ...]]:
        """By name, the parameters that several ranks of the pipeline have, and those ranks; the same on every rank."""
        return {}

    def elsewhere(self) -> frozenset[int]:
        """The ids of parameters that the model had before it was cut, are alive, and belong to other stages."""
        return frozenset()

    def commit(self) -> None:
        """The engine is made: nothing of other stages is needed again."""

    def restore(self) -> None:
        """The engine was not made: the model becomes what it was."""


def units_of(stages: PipelineStages, plan: Plan, stage: int) -> list[int]:
    """The numbers of the units of this rank's `plan` that one of its stages uses; none stands for all."""
    if len(stages.own_stages) == 1:
        return []
    return [
        index for index, unit in enumerate(plan.units) if any(stages.uses(stage, entry.name) for entry in unit.params)
    ]

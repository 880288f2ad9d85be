"""`pipeline`: how a model is cut into stages, and in which order they compute."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from zeroxide.config.facts import Resolved
from zeroxide.config.fields import Count, Flag, NoEffect, NotBuilt, Section, Text, WholeNumber, choice
from zeroxide.config.given import Given
from zeroxide.config.sections.mesh import MeshSection
from zeroxide.errors import ConfigError

__all__ = ["Pipeline", "PipelineSection", "resolve"]

_SHAPES = "what travels between stages is sent as it is"
SCHEDULES = (
    "1f1b",
    "gpipe",
    "looped_bfs",
    "interleaved_1f1b",
    "interleaved_zero_bubble",
    "zbv_zero_bubble",
    "dualpipe_v",
)


class PipelineSection(Section):
    """`pipeline`: how a model is cut into stages, and in which order they compute."""

    stages: Count | None = None
    """Ranks of a pipeline, as `zeroxide.mesh.pp`."""
    partition: Text | None = None
    """How a model that is no PipelineModule is cut: "best" or "parameters", "uniform", "type:REGEX", "profile"."""
    schedule: Annotated[
        Literal[
            "gpipe",
            "1f1b",
            "looped_bfs",
            "interleaved_1f1b",
            "interleaved_zero_bubble",
            "zbv_zero_bubble",
            "dualpipe_v",
        ]
        | None,
        choice(*SCHEDULES),
    ] = None
    """The order in which stages compute; zeroxide's own key."""
    stages_per_rank: Count | None = None
    """Stages of each rank, for the schedules that take several; zeroxide's own key."""
    activation_checkpoint_interval: WholeNumber | None = None
    """Layers of a PipelineModule that are recomputed together in backward; 0 for none."""
    seed_layers: Annotated[
        Flag | None, NotBuilt("seeds from the config: a PipelineModule is built before it is read", neutral=(False,))
    ] = None
    pipe_partitioned: Annotated[Any, NoEffect(_SHAPES)] = None
    grad_partitioned: Annotated[Any, NoEffect(_SHAPES)] = None
    use_reentrant: Annotated[Any, NoEffect("activations are recomputed without a backward inside of backward")] = None


@dataclass(frozen=True)
class Pipeline(Resolved):
    """How stages are made and run; None where the model, or a default, says."""

    key: ClassVar[str] = "pipeline"

    partition: str | None = None
    schedule: str | None = None
    stages_per_rank: int | None = None
    activation_checkpoint_interval: int = 0

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`."""
        return {f"{self.key}.{name}": value or None for name, value in dataclasses.asdict(self).items()}


def with_stages(section: PipelineSection | None, own: MeshSection | None, given: Given) -> MeshSection | None:
    """`zeroxide.mesh` with the stages of `pipeline.stages` and of the model. Raises ConfigError where they differ."""
    said = {
        "zeroxide.mesh.pp": None if own is None else own.pp,
        "pipeline.stages": None if section is None else section.stages,
        "the PipelineModule": given.stages,
    }
    found = {where: stages for where, stages in said.items() if stages is not None}
    if len(set(found.values())) > 1:
        shown = " and ".join(f"{stages} in {where}" for where, stages in found.items())
        raise ConfigError(f"a pipeline cannot have {shown} stages: give one number", path="pipeline.stages")
    if not found:
        return own
    stages = next(iter(found.values()))
    return (own or MeshSection()).model_copy(update={"pp": stages})


def resolve(section: PipelineSection | None, mesh: MeshSection | None, given: Given) -> Pipeline | None:
    """What the section comes to; None where there is no pipeline.

    Raises ConfigError for keys that say how stages are where there are none.
    """
    found = Pipeline() if section is None else _said(section)
    if (mesh is None or (mesh.pp or 1) == 1) and given.stages is None:
        if section is not None and section.stages is None and found != Pipeline():
            raise ConfigError(
                "pipeline says how stages are, and there is no pipeline: give pipeline.stages or zeroxide.mesh.pp, or "
                "a PipelineModule",
                path="pipeline",
            )
        return None
    return found


def _said(section: PipelineSection) -> Pipeline:
    return Pipeline(
        partition=section.partition,
        schedule=section.schedule,
        stages_per_rank=section.stages_per_rank,
        activation_checkpoint_interval=section.activation_checkpoint_interval or 0,
    )

"""What the config comes to: plain values that the rest of zeroxide reads, one attribute for each section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from zeroxide.config.facts import Resolved, may_differ
from zeroxide.config.rules import Rule
from zeroxide.config.sections.activation_checkpointing import ActivationCheckpointing
from zeroxide.config.sections.activations import Activations
from zeroxide.config.sections.aio import Aio
from zeroxide.config.sections.batch import Batch
from zeroxide.config.sections.checkpoint import Checkpoint
from zeroxide.config.sections.comms_logger import CommsLogging
from zeroxide.config.sections.expert_parallel import ExpertParallel
from zeroxide.config.sections.flops_profiler import FlopsProfile
from zeroxide.config.sections.gradients import Gradients
from zeroxide.config.sections.mesh import Mesh
from zeroxide.config.sections.monitor import Monitors
from zeroxide.config.sections.pipeline import Pipeline
from zeroxide.config.sections.precision import Precision
from zeroxide.config.sections.report import Report
from zeroxide.config.sections.scheduler import Scheduler
from zeroxide.config.sections.tensor_parallel import TensorParallel
from zeroxide.config.sections.zero import Zero
from zeroxide.config.sections.zeroxide import Zeroxide

__all__ = ["Config"]

_SAYS_NOTHING_NEW = may_differ("it says nothing beyond the other fields")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The resolved config. Sizes are bytes; `None` means that the engine or the plan chooses."""

    batch: Batch = field(default_factory=Batch)
    precision: Precision = field(default_factory=Precision)
    gradients: Gradients = field(default_factory=Gradients)
    optimizer: Rule | None = None
    """`None` when neither the config nor a shortcut asks for one."""
    scheduler: Scheduler | None = None
    zero: Zero = field(default_factory=Zero)
    mesh: Mesh | None = None
    """How the ranks are grouped; `None` is one shard group of all ranks, or at stage 0 all ranks as replicas."""
    pipeline: Pipeline | None = None
    """How stages of the model are made and run; `None` without a pipeline."""
    tensor_parallel: TensorParallel = field(default_factory=TensorParallel)
    aio: Aio = field(default_factory=Aio)
    activation_checkpointing: ActivationCheckpointing = field(default_factory=ActivationCheckpointing)
    activations: Activations = field(default_factory=Activations)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    zeroxide: Zeroxide = field(default_factory=Zeroxide)
    report: Report = field(default_factory=Report)
    monitor: Monitors = field(default_factory=Monitors)
    expert_parallel: ExpertParallel = field(default_factory=ExpertParallel)
    flops_profiler: FlopsProfile = field(default_factory=FlopsProfile)
    comms_logger: CommsLogging = field(default_factory=CommsLogging)

    no_effect: list[tuple[str, str]] = field(default_factory=list, metadata=_SAYS_NOTHING_NEW)
    """Keys that were accepted and do nothing, each with the reason, in the order of the schema."""
    source: Mapping[str, Any] = field(default_factory=dict, metadata=_SAYS_NOTHING_NEW)
    """The config as the user gave it, parsed but not changed."""

    def written(self) -> dict[str, Any]:
        """The document that comes to this, in full, by dotted key. None stands for a key that is better left out."""
        said: dict[str, Any] = {}
        for each in fields(self):
            section = getattr(self, each.name)
            if isinstance(section, Resolved):
                said |= section.written()
        return said

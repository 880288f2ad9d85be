"""`activation_checkpointing`: what becomes of activations. Checkpointing itself is the model's own, as torch has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from zeroxide.config.facts import Resolved, may_differ
from zeroxide.config.fields import Flag, NoEffect, NotBuilt, Section

__all__ = ["ActivationCheckpointing", "ActivationCheckpointingSection", "resolve"]


class ActivationCheckpointingSection(Section):
    """`activation_checkpointing`."""

    partition_activations: Annotated[Flag | None, NotBuilt("partitioned activations")] = None
    contiguous_memory_optimization: Annotated[Flag | None, NotBuilt("contiguous activation buffers")] = None
    cpu_checkpointing: Flag | None = None
    """Whether activations wait for backward in host memory; without effect where the model computes there."""
    number_checkpoints: Annotated[Any, NoEffect("only sizes contiguous activation buffers")] = None
    synchronize_checkpoint_boundary: Annotated[Any, NoEffect("checkpoint boundaries need no synchronisation")] = None
    profile: Annotated[Any, NoEffect("use torch.profiler")] = None


@dataclass(frozen=True)
class ActivationCheckpointing(Resolved):
    """Where activations are between forward and backward."""

    key: ClassVar[str] = "activation_checkpointing"

    cpu_checkpointing: bool = field(
        default=False, metadata=may_differ("each rank has memory of its own; it changes no number")
    )
    """Whether what autograd saves on a device waits for backward in host memory."""

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`."""
        return {"activation_checkpointing.cpu_checkpointing": self.cpu_checkpointing}


def resolve(section: ActivationCheckpointingSection | None) -> ActivationCheckpointing:
    """Where `section` wants activations to be."""
    return ActivationCheckpointing(cpu_checkpointing=bool(section is not None and section.cpu_checkpointing))

"""`activation_checkpointing`: the model's own checkpointing works as it is."""

from __future__ import annotations

from typing import Annotated, Any

from zeroxide.config.fields import Flag, NoEffect, NotBuilt, Section

__all__ = ["ActivationCheckpointing"]


class ActivationCheckpointing(Section):
    """`activation_checkpointing`: the model's own checkpointing works as it is; nothing here changes it yet."""

    partition_activations: Annotated[Flag | None, NotBuilt("partitioned activations")] = None
    contiguous_memory_optimization: Annotated[Flag | None, NotBuilt("contiguous activation buffers")] = None
    cpu_checkpointing: Annotated[Flag | None, NotBuilt("activation offload")] = None
    number_checkpoints: Annotated[Any, NoEffect("only sizes contiguous activation buffers")] = None
    synchronize_checkpoint_boundary: Annotated[Any, NoEffect("checkpoint boundaries need no synchronisation")] = None
    profile: Annotated[Any, NoEffect("use torch.profiler")] = None

"""`checkpoint`: how checkpoints are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from zeroxide.config.check import show
from zeroxide.config.facts import Resolved
from zeroxide.config.fields import Flag, NoEffect, NotBuilt, Section
from zeroxide.config.sections.zeroxide import ZeroxideSection
from zeroxide.errors import ConfigError

__all__ = ["Checkpoint", "CheckpointSection", "resolve"]

_WRITER = "checkpoints are written by zeroxide's own writer"


class CheckpointWriter(Section):
    """`checkpoint.writer`: whether training goes on while a checkpoint is written."""

    decoupled: Flag | None = None
    """As `zeroxide.checkpoint_background`."""
    type: Annotated[Any, NoEffect(_WRITER)] = None
    io_buffer_size: Annotated[Any, NoEffect(_WRITER)] = None
    io_buffer_double: Annotated[Any, NoEffect(_WRITER)] = None
    io_multiplier: Annotated[Any, NoEffect(_WRITER)] = None
    show_statistics: Annotated[Any, NoEffect("engine.checkpoint_stats() always has them")] = None
    data_parallel: Annotated[Any, NoEffect("every process writes its own shard")] = None


class CheckpointSection(Section):
    """`checkpoint`: how checkpoints are written."""

    tag_validation: Annotated[Any, NoEffect("ranks that disagree about the tag are always refused")] = None
    load_universal: Annotated[
        Flag | None, NotBuilt("loading universal checkpoints as they are, which zeroxide convert turns into its own")
    ] = None
    use_node_local_storage: Annotated[Flag | None, NotBuilt("checkpoints spread over node-local disks")] = None
    parallel_write: Annotated[Any, NoEffect("every process writes its own shard")] = None
    checkpoint_serialization: Annotated[Any, NoEffect(_WRITER)] = None
    writer: CheckpointWriter | None = None


@dataclass(frozen=True)
class Checkpoint(Resolved):
    """How checkpoints are written."""

    key: ClassVar[str] = "checkpoint"

    background: bool = False
    """Whether training goes on while a checkpoint is written."""
    memory: int | None = None
    """Most memory in which state waits to be written; `None` is half of what is free, within the memory budget."""

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`."""
        return {"zeroxide.checkpoint_background": self.background, "zeroxide.checkpoint_memory": self.memory}


def resolve(section: CheckpointSection | None, own: ZeroxideSection) -> Checkpoint:
    """What `section` and zeroxide's `own` keys for it come to. Raises ConfigError where they contradict each other."""
    return Checkpoint(background=_background(section, own), memory=own.checkpoint_memory)


def _background(section: CheckpointSection | None, own: ZeroxideSection) -> bool:
    writer = section.writer if section is not None else None
    theirs = None if writer is None else writer.decoupled
    if own.checkpoint_background is None:
        return bool(theirs)
    if theirs is not None and theirs is not own.checkpoint_background:
        raise ConfigError(
            f"zeroxide.checkpoint_background = {show(own.checkpoint_background)} contradicts "
            f"checkpoint.writer.decoupled = {show(theirs)}",
            path="zeroxide.checkpoint_background",
        )
    return own.checkpoint_background

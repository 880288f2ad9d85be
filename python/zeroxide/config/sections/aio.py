"""`aio`: the disk queue."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field

from zeroxide.config.facts import Resolved, may_differ
from zeroxide.config.fields import Count, Flag, NoEffect, Section, expecting

__all__ = ["Aio", "AioSection", "resolve"]

_QUEUE = "the queue keeps queue_depth requests in flight by itself"


class AioSection(Section):
    """`aio`."""

    queue_depth: Annotated[Count, Field(le=4096), expecting("an integer from 1 to 4096")] | None = None
    """Most disk requests in flight at once."""
    block_size: Annotated[Any, NoEffect("a request carries one tile; see zeroxide.tile_bytes")] = None
    intra_op_parallelism: Annotated[Any, NoEffect(_QUEUE)] = None
    thread_count: Annotated[Any, NoEffect(_QUEUE)] = None
    single_submit: Annotated[Any, NoEffect("requests are submitted in batches as they come")] = None
    overlap_events: Annotated[Any, NoEffect("submission and completion always overlap")] = None
    use_gds: Flag | None = None
    """Read weights on disk to the device without host memory in between. Refused with what stands in its way."""


@dataclass(frozen=True)
class Aio(Resolved):
    """The disk queue."""

    key: ClassVar[str] = "aio"

    queue_depth: int = field(default=32, metadata=may_differ("it fits the host's disk"))
    """Most disk requests in flight at once."""
    use_gds: bool = False
    """Whether weights on disk are to be read to the device without host memory in between."""

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`."""
        return {"aio.queue_depth": self.queue_depth, "aio.use_gds": self.use_gds}


def resolve(section: AioSection | None) -> Aio:
    """The queue as `section` asks for it."""
    if section is None:
        return Aio()
    usual = Aio()
    depth = usual.queue_depth if section.queue_depth is None else section.queue_depth
    return Aio(queue_depth=depth, use_gds=bool(section.use_gds))

"""`comms_logger`: what ranks send to one another, collective by collective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from zeroxide.config.facts import Resolved, may_differ
from zeroxide.config.fields import Flag, Section, Text
from zeroxide.config.given import Given

__all__ = ["OPS", "CommsLoggerSection", "CommsLogging", "resolve"]

OPS = {
    "all_gather": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_reduce": "all_reduce",
    "all_to_all": "all_to_all",
    "all_to_all_single": "all_to_all",
    "barrier": "barrier",
    "broadcast": "broadcast",
    "gather": "gather",
    "irecv": "recv",
    "isend": "send",
    "recv": "recv",
    "reduce": "reduce",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "scatter": "scatter",
    "send": "send",
}
"""What collectives of zeroxide and of `deepspeed.comm` are called in the log, by that name and DeepSpeed's."""

_ONE_LOGS = may_differ("one rank may log and the others not")


class CommsLoggerSection(Section):
    """`comms_logger`: what ranks send to one another, collective by collective."""

    enabled: Flag = False
    """Whether collectives are counted and timed, for `deepspeed.comm.log_summary()`."""
    verbose: Flag = False
    """Whether rank 0 logs each of them, at level INFO."""
    prof_all: Flag = True
    """Whether all kinds are, and not those in `prof_ops` alone."""
    prof_ops: list[Text] | None = None
    """Kinds that are, where not all are: all_gather, all_reduce, all_to_all, reduce_scatter, broadcast, send, ..."""
    debug: Flag = False
    """Whether each unit of the model has lines of its own."""


@dataclass(frozen=True)
class CommsLogging(Resolved):
    """Which collectives are counted and timed."""

    key: ClassVar[str] = "comms_logger"

    enabled: bool = field(default=False, metadata=_ONE_LOGS)
    verbose: bool = field(default=False, metadata=_ONE_LOGS)
    prof_all: bool = field(default=True, metadata=_ONE_LOGS)
    prof_ops: tuple[str, ...] = field(default=(), metadata=_ONE_LOGS)
    """As the document names them."""
    debug: bool = field(default=False, metadata=_ONE_LOGS)

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`."""
        ops = None if self.prof_all else list(self.prof_ops)
        others = {"verbose": self.verbose, "prof_all": self.prof_all, "prof_ops": ops, "debug": self.debug}
        said = {name: value if self.enabled else None for name, value in others.items()}
        return {"comms_logger.enabled": self.enabled, **{f"{self.key}.{name}": each for name, each in said.items()}}


def resolve(section: CommsLoggerSection | None, given: Given) -> CommsLogging:
    """What `section` comes to; what has no effect is listed: all of one that is off, and kinds that are never made."""
    given.note_off("comms_logger", section)
    if section is None or not section.enabled:
        return CommsLogging()
    ops = tuple(section.prof_ops or ())
    if ops and section.prof_all:
        given.no_effect.append(("comms_logger.prof_ops", "comms_logger.prof_all is true"))
        ops = ()
    elif unknown := [name for name in ops if name not in OPS]:
        reason = f"nothing that is logged is called {' or '.join(unknown)}"
        given.no_effect.append(("comms_logger.prof_ops", reason))
    return CommsLogging(True, section.verbose, section.prof_all, ops, section.debug)

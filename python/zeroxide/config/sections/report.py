"""What training prints: keys at the top of the document."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from zeroxide.config.facts import Resolved, may_differ
from zeroxide.config.fields import Flag, NoEffect, PrintInterval, Section

__all__ = ["Report", "ReportKeys", "resolve"]

_ONE_PRINTS = may_differ("one rank may print and the others not")


class ReportKeys(Section):
    """The keys."""

    steps_per_print: PrintInterval = None
    """Optimizer steps between progress lines; without it there are none."""
    wall_clock_breakdown: Flag = False
    """Whether rank 0 prints the times of forward, backward and step after each step."""
    memory_breakdown: Annotated[Flag | None, NoEffect("engine.memory() always has it")] = None
    dump_state: Annotated[Flag | None, NoEffect("print engine.plan() instead")] = None
    log_level: Annotated[Any, NoEffect("set the level of Python's logger 'zeroxide'")] = None
    disable_python_gc: Annotated[Flag | None, NoEffect("Python's garbage collector is left as it is")] = None
    timers: Annotated[Any, NoEffect("throughput is timed without synchronising")] = None


@dataclass(frozen=True)
class Report(Resolved):
    """Which lines training prints."""

    key: ClassVar[str] = ""

    steps_per_print: int | None = field(default=None, metadata=_ONE_PRINTS)
    """Optimizer steps between progress lines; `None` prints none."""
    wall_clock_breakdown: bool = field(default=False, metadata=_ONE_PRINTS)
    """Whether rank 0 prints the times of forward, backward and step after each step."""

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`."""
        return {"steps_per_print": self.steps_per_print, "wall_clock_breakdown": self.wall_clock_breakdown}


def resolve(keys: ReportKeys) -> Report:
    """The lines that `keys` ask for."""
    return Report(keys.steps_per_print, keys.wall_clock_breakdown)

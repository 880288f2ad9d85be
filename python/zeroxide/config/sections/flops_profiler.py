"""`flops_profiler`: what forward costs, module by module, at one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from zeroxide.config.facts import Resolved, may_differ
from zeroxide.config.fields import Count, File, Flag, NonNegative, Section, WholeNumber, expecting, whole
from zeroxide.config.given import Given

__all__ = ["FlopsProfile", "FlopsProfilerSection", "resolve"]

_RANK_0_MEASURES = may_differ("rank 0 alone measures, and no number depends on it")


class FlopsProfilerSection(Section):
    """`flops_profiler`: what forward costs, module by module, at one step."""

    enabled: Flag = False
    """Whether rank 0 measures and prints it."""
    recompute_fwd_factor: NonNegative = 0.0
    """How much of forward is done again in backward, for the estimate of its FLOPs: 1 with activation checkpointing."""
    profile_step: WholeNumber = 1
    """Optimizer steps before the one whose first forward is measured."""
    module_depth: Annotated[
        int, Field(ge=-1, le=1024), BeforeValidator(whole), expecting("an integer from -1 to 1024")
    ] = -1
    """How deep below the model modules are shown; -1 shows all."""
    top_modules: Count = 1
    """Of how many kinds of modules the sums are shown at each depth."""
    detailed: Flag = True
    """Whether every module has a line."""
    output_file: File | None = None
    """File that is written instead of printing."""


@dataclass(frozen=True)
class FlopsProfile(Resolved):
    """What is measured at which step."""

    key: ClassVar[str] = "flops_profiler"

    enabled: bool = field(default=False, metadata=_RANK_0_MEASURES)
    recompute_fwd_factor: float = field(default=0.0, metadata=_RANK_0_MEASURES)
    profile_step: int = field(default=1, metadata=_RANK_0_MEASURES)
    module_depth: int = field(default=-1, metadata=_RANK_0_MEASURES)
    top_modules: int = field(default=1, metadata=_RANK_0_MEASURES)
    detailed: bool = field(default=True, metadata=_RANK_0_MEASURES)
    output_file: Path | None = field(default=None, metadata=_RANK_0_MEASURES)

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`."""
        others = {
            "recompute_fwd_factor": self.recompute_fwd_factor,
            "profile_step": self.profile_step,
            "module_depth": self.module_depth,
            "top_modules": self.top_modules,
            "detailed": self.detailed,
            "output_file": self.output_file,
        }
        said = others if self.enabled else dict.fromkeys(others)
        return {"flops_profiler.enabled": self.enabled, **{f"{self.key}.{name}": said[name] for name in said}}


def resolve(section: FlopsProfilerSection | None, given: Given) -> FlopsProfile:
    """What `section` comes to; what else is said in one that is off has no effect, and is listed."""
    given.note_off("flops_profiler", section)
    if section is None or not section.enabled:
        return FlopsProfile()
    return FlopsProfile(**{name: getattr(section, name) for name in FlopsProfilerSection.model_fields})

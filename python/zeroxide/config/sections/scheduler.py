"""`scheduler`: DeepSpeed's schedules."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from zeroxide.config.check import show
from zeroxide.config.facts import Resolved
from zeroxide.config.fields import (
    LARGEST_COUNT,
    Count,
    Flag,
    Momenta,
    NonNegative,
    Positive,
    Rates,
    Section,
    WholeNumber,
    expecting,
    in_any_case,
    whole,
)
from zeroxide.config.given import Given
from zeroxide.errors import ConfigError

__all__ = [
    "DEFAULTS",
    "SCHEDULES",
    "OneCycleParams",
    "RangeTestParams",
    "Scheduler",
    "SchedulerSection",
    "WarmupCosineParams",
    "WarmupDecayParams",
    "WarmupParams",
    "resolve",
]

logger = logging.getLogger("zeroxide")


def _warmup_type(value: Any) -> str:
    """As DeepSpeed compares names, with their case: of another case is not its "linear", and gives its default."""
    if value in ("log", "linear"):
        return str(value)
    if isinstance(value, str) and value.lower() in ("log", "linear"):
        return "log"
    raise ValueError


WarmupType = Annotated[
    Literal["log", "linear"],
    PlainValidator(_warmup_type),
    expecting('"log" or "linear"'),
    WithJsonSchema(
        {"anyOf": [{"enum": ["log", "linear"]}, {"type": "string", "pattern": in_any_case("log", "linear")}]}
    ),
]


class SchedulerParams(Section):
    """What all schedules share."""

    last_batch_iteration: (
        Annotated[
            int,
            BeforeValidator(whole),
            Field(ge=-1, le=LARGEST_COUNT),
            expecting(f"an integer from -1 to {LARGEST_COUNT}"),
        ]
        | None
    ) = None
    """The iteration whose rate the first step has; -1 for the beginning."""


class RangeTestParams(SchedulerParams):
    """`LRRangeTest`: from `lr_range_test_min_lr` up without end."""

    lr_range_test_min_lr: Rates | None = None
    """Where the rate begins: one number, or one for each parameter group."""
    lr_range_test_step_size: Count | None = None
    """Optimizer steps of an interval."""
    lr_range_test_step_rate: NonNegative | None = None
    """What an interval adds, in units of where the rate begins."""
    lr_range_test_staircase: Flag | None = None
    """Whether the rate stays within an interval."""


class OneCycleParams(SchedulerParams):
    """`OneCycle`: from `cycle_min_lr` to `cycle_max_lr` and back, then a decay."""

    cycle_min_lr: Rates
    """Where the rate begins and ends: one number, or one for each parameter group."""
    cycle_max_lr: Rates
    """Its top."""
    decay_lr_rate: NonNegative | None = None
    """How fast the rate decays after the cycle."""
    cycle_first_step_size: Positive | None = None
    """Optimizer steps up."""
    cycle_second_step_size: NonNegative | None = None
    """Optimizer steps down; as many as up without it."""
    cycle_first_stair_count: WholeNumber | None = None
    """Stairs on the way up; 0 for a straight line."""
    cycle_second_stair_count: WholeNumber | None = None
    """Stairs on the way down; as many as on the way up without it."""
    decay_step_size: NonNegative | None = None
    """Optimizer steps in which the decay's rates count once; 0 for no decay."""
    cycle_momentum: Flag | None = None
    """Whether Adam's first beta moves the other way; the second is 0.99 then."""
    cycle_min_mom: Momenta | None = None
    """The first beta at the top of the rate, and at the first step."""
    cycle_max_mom: Momenta | None = None
    """The first beta at the bottom of the rate."""
    decay_mom_rate: NonNegative | None = None
    """How fast the first beta grows after the cycle."""


class WarmupSchedulerParams(SchedulerParams):
    """What the three warm-up schedules share."""

    warmup_num_steps: Count | None = None
    """Optimizer steps of the warm-up."""
    warmup_type: WarmupType | None = None
    """How the rate rises: "log" or "linear"."""


class WarmupParams(WarmupSchedulerParams):
    """`WarmupLR`: from `warmup_min_lr` to `warmup_max_lr`, then constant."""

    warmup_min_lr: Rates | None = None
    """Where the rate begins: one number, or one for each parameter group."""
    warmup_max_lr: Rates | None = None
    """Where the warm-up ends; without it the optimizer's own rate."""


class WarmupDecayParams(WarmupParams):
    """`WarmupDecayLR`: warm-up, then a straight line to 0 at `total_num_steps`."""

    total_num_steps: Count
    """The step at which the rate is 0."""


class WarmupCosineParams(WarmupSchedulerParams):
    """`WarmupCosineLR`: warm-up to the optimizer's rate, then half a cosine down to `cos_min_ratio` of it."""

    total_num_steps: Count
    """The step at which the cosine ends."""
    warmup_min_ratio: Annotated[float, Field(ge=0, le=1), expecting("a number from 0 to 1")] | None = None
    """Where the warm-up begins, as a share of the optimizer's rate."""
    cos_min_ratio: Annotated[float, Field(ge=0, le=1), expecting("a number from 0 to 1")] | None = None
    """Where the cosine ends, as a share of the optimizer's rate."""


class SchedulerSection(Section):
    """`scheduler`. The keys of `params` depend on `type` and are checked once that is known."""

    type: Annotated[str, expecting("the name of a schedule")]
    """The schedule."""
    params: Annotated[dict[str, Any], expecting("an object")] = Field(default_factory=dict)
    """Its arguments."""


SCHEDULES: dict[str, type[SchedulerParams]] = {
    "LRRangeTest": RangeTestParams,
    "OneCycle": OneCycleParams,
    "WarmupLR": WarmupParams,
    "WarmupDecayLR": WarmupDecayParams,
    "WarmupCosineLR": WarmupCosineParams,
}

_WARMUP = {"warmup_num_steps": 1000, "warmup_type": "log", "last_batch_iteration": -1}
DEFAULTS: dict[str, dict[str, Any]] = {
    "LRRangeTest": {
        "lr_range_test_min_lr": 1e-3,
        "lr_range_test_step_size": 2000,
        "lr_range_test_step_rate": 1.0,
        "lr_range_test_staircase": False,
        "last_batch_iteration": -1,
    },
    "OneCycle": {
        "decay_lr_rate": 0.0,
        "cycle_first_step_size": 2000,
        "cycle_second_step_size": None,
        "cycle_first_stair_count": 0,
        "cycle_second_stair_count": None,
        "decay_step_size": 0,
        "cycle_momentum": True,
        "cycle_min_mom": 0.8,
        "cycle_max_mom": 0.9,
        "decay_mom_rate": 0.0,
        "last_batch_iteration": -1,
    },
    "WarmupLR": {**_WARMUP, "warmup_min_lr": 0.0, "warmup_max_lr": None},
    "WarmupDecayLR": {**_WARMUP, "warmup_min_lr": 0.0, "warmup_max_lr": 0.001},
    "WarmupCosineLR": {**_WARMUP, "warmup_min_ratio": 0.0, "cos_min_ratio": 0.0001},
}
"""What the classes of `zeroxide.optim.schedules` take for arguments that are not given."""


@dataclass(frozen=True, slots=True)
class Scheduler(Resolved):
    """A schedule: the class of that name in `zeroxide.optim.schedules` and its keyword arguments."""

    key: ClassVar[str] = "scheduler"

    name: Literal["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]
    params: Mapping[str, Any]

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`."""
        said = {**DEFAULTS[self.name], **self.params}
        return {"scheduler.type": self.name, **{f"scheduler.params.{name}": value for name, value in said.items()}}


def resolve(section: SchedulerSection | None, given: Given) -> Scheduler | None:
    """The schedule that is asked for. Raises ConfigError for another type and for keys that do not fit."""
    if section is None:
        return None
    model = SCHEDULES.get(section.type)
    if model is None:
        raise given.unknown_type("scheduler.type", section.type, tuple(SCHEDULES), ())
    params = given.params(model, "scheduler", section.params)
    chosen = {name: getattr(params, name) for name in model.model_fields if name in params.model_fields_set}
    _check_rates({**DEFAULTS[section.type], **chosen}, chosen, given.origin)
    written = section.params.get("warmup_type")
    if isinstance(written, str) and written != chosen.get("warmup_type", written):
        logger.warning(
            'scheduler.params.warmup_type: %s is not "linear", and DeepSpeed, which compares names with their case, '
            'takes what it does not know for "log": so does this run; write "linear" or "log"',
            show(written),
        )
    return Scheduler(section.type, chosen)  # type: ignore[arg-type]  # the table above holds exactly these names


def _check_rates(params: Mapping[str, Any], given: Mapping[str, Any], origin: str) -> None:
    of = "cycle" if "cycle_min_lr" in params else "warmup"
    low, high = params.get(f"{of}_min_lr", 0.0), params.get(f"{of}_max_lr")
    if high is None:
        return
    lows, highs = (each if isinstance(each, list) else [each] for each in (low, high))
    count = max(len(lows), len(highs))
    pairs = zip(lows * (count if len(lows) == 1 else 1), highs * (count if len(highs) == 1 else 1), strict=False)
    if any(below > above for below, above in pairs):
        raise ConfigError(
            f"{origin}: scheduler.params.{of}_min_lr = {low} is above scheduler.params.{of}_max_lr = {high}"
            + ("" if f"{of}_max_lr" in given else ", its default"),
            path=f"scheduler.params.{of}_min_lr",
        )

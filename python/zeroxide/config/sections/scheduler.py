"""`scheduler`: the three warm-up schedules."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from zeroxide.config.check import show
from zeroxide.config.facts import Resolved
from zeroxide.config.fields import LARGEST_COUNT, Count, Rates, Section, expecting, in_any_case, whole
from zeroxide.config.given import Given
from zeroxide.errors import ConfigError

__all__ = [
    "DEFAULTS",
    "SCHEDULES",
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
    """What the three warm-up schedules share."""

    warmup_num_steps: Count | None = None
    """Optimizer steps of the warm-up."""
    warmup_type: WarmupType | None = None
    """How the rate rises: "log" or "linear"."""
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


class WarmupParams(SchedulerParams):
    """`WarmupLR`: from `warmup_min_lr` to `warmup_max_lr`, then constant."""

    warmup_min_lr: Rates | None = None
    """Where the rate begins: one number, or one for each parameter group."""
    warmup_max_lr: Rates | None = None
    """Where the warm-up ends; without it the optimizer's own rate."""


class WarmupDecayParams(WarmupParams):
    """`WarmupDecayLR`: warm-up, then a straight line to 0 at `total_num_steps`."""

    total_num_steps: Count
    """The step at which the rate is 0."""


class WarmupCosineParams(SchedulerParams):
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
    "WarmupLR": WarmupParams,
    "WarmupDecayLR": WarmupDecayParams,
    "WarmupCosineLR": WarmupCosineParams,
}
_TO_COME = ("LRRangeTest", "OneCycle")

_WARMUP = {"warmup_num_steps": 1000, "warmup_type": "log", "last_batch_iteration": -1}
DEFAULTS: dict[str, dict[str, Any]] = {
    "WarmupLR": {**_WARMUP, "warmup_min_lr": 0.0, "warmup_max_lr": None},
    "WarmupDecayLR": {**_WARMUP, "warmup_min_lr": 0.0, "warmup_max_lr": 0.001},
    "WarmupCosineLR": {**_WARMUP, "warmup_min_ratio": 0.0, "cos_min_ratio": 0.0001},
}
"""What the classes of `zeroxide.optim.schedules` take for arguments that are not given."""


@dataclass(frozen=True, slots=True)
class Scheduler(Resolved):
    """A schedule: the class of that name in `zeroxide.optim.schedules` and its keyword arguments."""

    key: ClassVar[str] = "scheduler"

    name: Literal["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]
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
        raise given.unknown_type("scheduler.type", section.type, tuple(SCHEDULES), _TO_COME)
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
    return Scheduler(section.type, chosen)  # type: ignore[arg-type]  # the table above holds exactly the three names


def _check_rates(params: Mapping[str, Any], given: Mapping[str, Any], origin: str) -> None:
    low, high = params.get("warmup_min_lr", 0.0), params.get("warmup_max_lr")
    if high is None:
        return
    lows, highs = (each if isinstance(each, list) else [each] for each in (low, high))
    count = max(len(lows), len(highs))
    pairs = zip(lows * (count if len(lows) == 1 else 1), highs * (count if len(highs) == 1 else 1), strict=False)
    if any(below > above for below, above in pairs):
        raise ConfigError(
            f"{origin}: scheduler.params.warmup_min_lr = {low} is above scheduler.params.warmup_max_lr = {high}"
            + ("" if "warmup_max_lr" in given else ", its default"),
            path="scheduler.params.warmup_min_lr",
        )

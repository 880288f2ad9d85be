"""`tensorboard`, `wandb` and `csv_monitor`: where training's numbers are written to while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from zeroxide.config.facts import Resolved, may_differ
from zeroxide.config.fields import Flag, Folder, NotBuilt, Section, Text
from zeroxide.config.given import Given

__all__ = ["LogFolder", "MonitorKeys", "Monitors", "WandbRun", "resolve"]

_JOB = "DeepSpeedJobName"
_PROJECT = "deepspeed"
_INSTEAD = "tensorboard, wandb, csv_monitor and zeroxide.log are there"
_RANK_0_WRITES = may_differ("rank 0 alone writes, and no number depends on it")


class TensorboardSection(Section):
    """`tensorboard`: event files for TensorBoard; needs the package of that name."""

    enabled: Flag = False
    """Whether rank 0 writes them."""
    output_path: Folder = ""
    """Folder in which a folder of the job's name is made; without it the working directory."""
    job_name: Text = _JOB
    """Name of that folder."""


class WandbSection(Section):
    """`wandb`: a run of Weights & Biases; needs the package of that name."""

    enabled: Flag = False
    """Whether rank 0 begins one, or goes on with the one that the script has begun."""
    group: Text | None = None
    """Group of runs that it belongs to."""
    team: Text | None = None
    """Team, or user, whose project it is; without it the one who is logged in."""
    project: Text = _PROJECT
    """Project that it belongs to."""


class CsvSection(Section):
    """`csv_monitor`: one CSV file for each tag."""

    enabled: Flag = False
    """Whether rank 0 writes them."""
    output_path: Folder = ""
    """Folder in which a folder of the job's name is made; without it the working directory."""
    job_name: Text = _JOB
    """Name of that folder."""


class MonitorKeys(Section):
    """The sections, at the top of the document."""

    tensorboard: TensorboardSection | None = None
    wandb: WandbSection | None = None
    csv_monitor: CsvSection | None = None
    comet: Annotated[Any, NotBuilt(f"Comet ({_INSTEAD})")] = None
    monitor_config: Annotated[
        Any, NotBuilt("monitors below monitor_config (they stand at the top of the config, as in DeepSpeed)")
    ] = None


@dataclass(frozen=True)
class LogFolder:
    """Where a monitor writes its files: a folder `job_name` in `output_path`."""

    output_path: str
    job_name: str


@dataclass(frozen=True)
class WandbRun:
    """What a run of Weights & Biases is begun with."""

    project: str
    group: str | None = None
    team: str | None = None


@dataclass(frozen=True)
class Monitors(Resolved):
    """Which monitors rank 0 writes to; None for one that is off."""

    key: ClassVar[str] = ""

    tensorboard: LogFolder | None = field(default=None, metadata=_RANK_0_WRITES)
    wandb: WandbRun | None = field(default=None, metadata=_RANK_0_WRITES)
    csv_monitor: LogFolder | None = field(default=None, metadata=_RANK_0_WRITES)

    @property
    def enabled(self) -> bool:
        """Whether there is any."""
        return self.tensorboard is not None or self.wandb is not None or self.csv_monitor is not None

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`."""
        run = self.wandb
        return {
            **_folder("tensorboard", self.tensorboard),
            "wandb.enabled": run is not None,
            "wandb.group": None if run is None else run.group,
            "wandb.team": None if run is None else run.team,
            "wandb.project": None if run is None else run.project,
            **_folder("csv_monitor", self.csv_monitor),
        }


def _folder(name: str, folder: LogFolder | None) -> dict[str, Any]:
    return {
        f"{name}.enabled": folder is not None,
        f"{name}.output_path": None if folder is None else folder.output_path,
        f"{name}.job_name": None if folder is None else folder.job_name,
    }


def resolve(keys: MonitorKeys, given: Given) -> Monitors:
    """The monitors that are on. What else is said of one that is off has no effect, and is listed."""
    tensorboard, wandb, csv = keys.tensorboard, keys.wandb, keys.csv_monitor
    for name, section in (("tensorboard", tensorboard), ("wandb", wandb), ("csv_monitor", csv)):
        given.note_off(name, section)
    return Monitors(
        tensorboard=_place(tensorboard),
        wandb=WandbRun(wandb.project, wandb.group, wandb.team) if wandb is not None and wandb.enabled else None,
        csv_monitor=_place(csv),
    )


def _place(section: TensorboardSection | CsvSection | None) -> LogFolder | None:
    return LogFolder(section.output_path, section.job_name) if section is not None and section.enabled else None

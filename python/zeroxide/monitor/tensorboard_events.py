"""Event files for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zeroxide.config import LogFolder
from zeroxide.monitor.optional import optional

if TYPE_CHECKING:
    from zeroxide.monitor.monitor import Event

__all__ = ["TensorboardEvents"]


class TensorboardEvents:
    """One event file in the folder of the job, as `torch.utils.tensorboard` writes it: each run adds one."""

    key = "tensorboard"

    def __init__(self, place: LogFolder) -> None:
        package = optional("torch.utils.tensorboard", package="tensorboard", key="tensorboard.enabled")
        folder = Path(place.output_path) / place.job_name
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = package.SummaryWriter(log_dir=str(folder))

    def write(self, events: Sequence[Event]) -> None:
        """See `Writer.write`."""
        for tag, value, step in events:
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self) -> None:
        """See `Writer.close`."""
        self._writer.close()

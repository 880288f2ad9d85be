"""A run of Weights & Biases."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

from zeroxide.config import WandbRun
from zeroxide.monitor.optional import optional

if TYPE_CHECKING:
    from zeroxide.monitor.monitor import Event

__all__ = ["WandbWriter"]


class WandbWriter:
    """The run of this process: a new one, or the one that the script has begun, which then stays the script's.

    Whether it goes to the network is W&B's to decide (`WANDB_MODE=offline` keeps it in a folder).
    """

    key = "wandb"

    def __init__(self, run: WandbRun) -> None:
        wandb = optional("wandb", package="wandb", key="wandb.enabled")
        self._owned = wandb.run is None
        self._run = wandb.init(project=run.project, group=run.group, entity=run.team) if self._owned else wandb.run

    def write(self, events: Sequence[Event]) -> None:
        """Events of one step in a row are one row of the run, as W&B counts steps up and never back."""
        for step, row in itertools.groupby(events, key=itemgetter(2)):
            self._run.log({tag: value for tag, value, _ in row}, step=step)

    def close(self) -> None:
        """Ends the run, if it was begun here."""
        if self._owned:
            self._run.finish()

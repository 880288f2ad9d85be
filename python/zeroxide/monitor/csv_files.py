"""One CSV file for each tag."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zeroxide.config import LogFolder

if TYPE_CHECKING:
    from zeroxide.monitor.monitor import Event

__all__ = ["CsvFiles"]


class CsvFiles:
    """Files in the folder of the job: "Train/Samples/lr" is Train_Samples_lr.csv, with the header "step,lr".

    A file that is there grows by rows alone, so that a run that goes on makes one table with what was before.
    """

    key = "csv_monitor"

    def __init__(self, place: LogFolder) -> None:
        self._folder = Path(place.output_path) / place.job_name
        self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, events: Sequence[Event]) -> None:
        """See `Writer.write`."""
        for tag, value, step in events:
            path = self._folder / f"{tag.replace('/', '_').replace(' ', '_')}.csv"
            with path.open("a", newline="") as file:
                table = csv.writer(file)
                if file.tell() == 0:
                    table.writerow(["step", tag.rpartition("/")[2]])
                table.writerow([step, value])

    def close(self) -> None:
        """Nothing is open."""

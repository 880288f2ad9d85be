"""The log of steps: a file with a line of JSON for each optimizer step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zeroxide.errors import ConfigError

if TYPE_CHECKING:
    from zeroxide.monitor.monitor import Event

__all__ = ["StepLog"]


class StepLog:
    """Adds lines to `path`, each whole and readable at once. Its folder is made; a file that is there grows.

    A number that is not finite, for which JSON has no word, is the text "nan", "inf" or "-inf". Raises ConfigError
    where the file cannot be opened; OSError of a write is the caller's to say.
    """

    key = "zeroxide.log"

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            broken = path.exists() and _ends_in_a_line(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{self.key}: cannot write to {path}: {error.strerror}", path=self.key) from error
        if broken:
            # What a run was stopped in the middle of is a line of its own.
            self._file.write("\n")

    def write(self, events: Sequence[Event]) -> None:
        """Adds a line for each event of a script's own, with its `tag`, `value` and `x`."""
        for tag, value, step in events:
            self.add({"tag": tag, "value": value, "x": step})

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds one line."""
        self._file.write(json.dumps(_plain(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """See `Writer.close`."""
        self._file.close()


def _ends_in_a_line(path: Path) -> bool:
    """Whether the last line of a file has no end."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, str | int) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else repr(number)

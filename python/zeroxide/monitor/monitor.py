"""All monitors of a job as one: events go to each of them, and one that fails is left out from then on.

Rank 0 has the writers; on other ranks a monitor has none and takes events all the same, so that scripts need not ask.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Protocol

from zeroxide.config import Config
from zeroxide.errors import ConfigError
from zeroxide.monitor.csv_files import CsvFiles
from zeroxide.monitor.step_log import StepLog
from zeroxide.monitor.tensorboard_events import TensorboardEvents
from zeroxide.monitor.wandb_run import WandbWriter

__all__ = ["Event", "Monitor", "Writer", "open_writers"]

logger = logging.getLogger("zeroxide")

Event = tuple[str, Any, int]
"""A tag, its value (a number), and where it stands on the x axis: samples so far, in events of the engine's."""


class Writer(Protocol):
    """One place that events go to. What it raises, `Monitor` says."""

    key: str
    """The section of the config that asked for it."""

    def write(self, events: Sequence[Event]) -> None:
        """Writes events, in order, so that a reader sees them at once."""

    def close(self) -> None:
        """Ends it. Nothing is written after that."""


class Monitor:
    """Writes events to all of `writers`.

    A writer that raises is named in one warning with the reason, closed, and gets nothing more: training and the other
    writers go on.
    """

    def __init__(self, writers: Iterable[Writer] = (), *, enabled: bool = False) -> None:
        self.enabled = enabled
        """Whether the config asks for any writer: the same on every rank that has the same config."""
        self._writers = list(writers)

    @property
    def writes(self) -> bool:
        """Whether an event given now would be written anywhere."""
        return bool(self._writers)

    def write_events(self, event_list: Iterable[Event]) -> None:
        """Writes (tag, value, step) of each event, value a number, to every writer. Raises nothing of a writer's."""
        events = list(event_list)
        self._each(lambda writer: writer.write(events))

    def write_step(self, events: Sequence[Event], record: Mapping[str, Any]) -> None:
        """Writes what there is to say of an optimizer step: a `record` to the log of steps, `events` to all others."""
        self._each(lambda writer: writer.add(record) if isinstance(writer, StepLog) else writer.write(events))

    def _each(self, act: Callable[[Writer], None]) -> None:
        for writer in tuple(self._writers):
            try:
                act(writer)
            # Whatever goes wrong there, a step must not fail of it.
            except Exception as error:
                self._writers.remove(writer)
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                logger.warning("%s failed, and nothing more is written there: %s", writer.key, reason)
                with suppress(Exception):
                    writer.close()

    def close(self) -> None:
        """Ends every writer; one that fails then is named in a warning."""
        writers, self._writers = self._writers, []
        for writer in writers:
            try:
                writer.close()
            except Exception as error:
                logger.warning("%s failed when it was closed: %s", writer.key, " ".join(str(error).split()))


def open_writers(config: Config) -> list[Writer]:
    """The monitors and the log of steps that `config` asks for, opened on this rank.

    Raises ConfigError that names the key: for a package that is not there, with the command that installs it, and for a
    folder or run that cannot be made. Nothing stays open then.
    """
    made: list[Writer] = []
    with ExitStack() as opened:
        for key, place, kind in (
            ("tensorboard", config.monitor.tensorboard, TensorboardEvents),
            ("wandb", config.monitor.wandb, WandbWriter),
            ("csv_monitor", config.monitor.csv_monitor, CsvFiles),
            ("zeroxide.log", config.zeroxide.log, StepLog),
        ):
            if place is None:
                continue
            try:
                writer: Writer = kind(place)  # type: ignore[arg-type]
            except ConfigError:
                raise
            except Exception as error:  # each package has errors of its own
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ConfigError(f"{key}: it cannot be written to: {reason}", path=key) from error
            opened.callback(writer.close)
            made.append(writer)
        opened.pop_all()
    return made

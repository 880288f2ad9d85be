"""Saving while training goes on: state is captured into bounded memory ahead of the next update, and written beside it.

One thread captures the state of this rank, chunk by chunk, as fast as memory takes it; another one writes. An optimizer
step waits until everything is captured, and nothing else waits. Where the memory holds all of the state, that is long
before the step comes; where it does not, the step waits for the writer to make room.

Where a durable run has committed the state, the commit is read, which stays where it is: no step waits, and the next
commit waits for all of it to be read.

What no step will wait for is done slowly, so that training keeps its cores: capturing where a commit is read, and
writing once everything is captured. Whoever does wait has it done as fast as it goes.

The ranks do not meet while training goes on, since their collectives would mix with those of the training. Each leaves
a report in the directory aside when its files are durable, and rank 0 commits when it has found them all. They meet
when the save is concluded: at the next save or load or at `wait_for_checkpoint`. They do not when the engine is
destroyed, since a rank may do that alone: then rank 0 waits for reports as long as files grow.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zeroxide import _core
from zeroxide.checkpoint.format.stream import write_all
from zeroxide.checkpoint.live_state import CHUNK_ELEMENTS, LiveState
from zeroxide.checkpoint.save.pace import Pace
from zeroxide.checkpoint.save.save import Save
from zeroxide.checkpoint.save.snapshot import Slab, Slabs, SlabStaging, SnapshotEnded
from zeroxide.checkpoint.save.values import values
from zeroxide.errors import CheckpointError

if TYPE_CHECKING:
    from zeroxide.engine.training_state import TrainingState

__all__ = ["BackgroundSave"]

logger = logging.getLogger("zeroxide")

CHUNK_BYTES = CHUNK_ELEMENTS * 4
REPORT = ".report-"
POLL_SECONDS = 0.02
PATIENCE_SECONDS = 15.0
"""How long rank 0 waits for files that do not grow, once it is not known that the other ranks go on."""


class BackgroundSave:
    """One save under way.

    source: the commit that has its state, where there is one; closed when it has been read.
    """

    def __init__(
        self, training: TrainingState, save: Save, memory: int, source: _core.CommittedReads | None = None
    ) -> None:
        self._source = source
        # Kept, since the core that is read here ends with whoever holds it last.
        self._training = training
        self._save = save
        self.slabs = Slabs(memory, CHUNK_BYTES)
        self.captured = threading.Event()
        self.bytes = 0
        self.seconds = 0.0
        self.target = save.target
        self._written = threading.Event()
        self._stop = threading.Event()
        self._alone = threading.Event()
        self._hurry = threading.Event()
        self._write_error: BaseException | None = None
        self._commit_error: BaseException | None = None
        self._chunks: queue.SimpleQueue[tuple[torch.Tensor, Slab | None] | BaseException | None] = queue.SimpleQueue()
        self._capturing = threading.Thread(target=self._capture, name="zeroxide-capture")
        self._writing = threading.Thread(target=self._run, name="zeroxide-save")
        self._capturing.start()
        self._writing.start()

    def is_alive(self) -> bool:
        """Whether it is still being written."""
        return self._writing.is_alive()

    def _capture(self) -> None:
        staging = SlabStaging(self.slabs)
        try:
            live, pace = LiveState(self._training, staging, self._source), Pace(self._hurry)
            for chunk in values(self._save.description, live):
                self._chunks.put((chunk, staging.last()))
                pace.rest(needed=not self.reads_commit)
        except SnapshotEnded:
            pass  # the writer says why
        except BaseException as error:
            self._chunks.put(error)
        finally:
            if self._source is not None:
                self._source.close()
            self._chunks.put(None)
            self.slabs.no_more()
            self.captured.set()

    @property
    def reads_commit(self) -> bool:
        """Whether the state is read from a commit: it may change meanwhile."""
        return self._source is not None

    def _values(self) -> Iterator[torch.Tensor]:
        """What is captured, in order; each chunk is valid until the next one is taken."""
        pace = Pace(self._hurry)
        while True:
            found = self._chunks.get()
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            chunk, slab = found
            # Counted before it is handed out: whoever takes the last one need not come back.
            self.bytes += chunk.nbytes
            yield chunk
            if slab is not None:
                self.slabs.give_back(slab)
            pace.rest(needed=not self.reads_commit and not self.captured.is_set())

    def wait_until_captured(self) -> None:
        """Returns when the state may change."""
        self._hurry.set()
        self.captured.wait()
        self._hurry.clear()

    def _run(self) -> None:
        start = time.perf_counter()
        try:
            report = self._write()
            self._written.set()
            if report is not None and self._save.team.leads:
                self._commit(report)
        finally:
            if self._save.team.world == 1:
                self._save.close()
            self.seconds = time.perf_counter() - start

    def _write(self) -> dict[str, Any] | None:
        try:
            report = self._save.write(self._values())
            self._leave(report)
        except BaseException as error:
            self._write_error = error
            self.slabs.end()
            with contextlib.suppress(OSError):
                self._leave({"error": _log(error)})
            return None
        return report

    def _commit(self, report: dict[str, Any]) -> None:
        try:
            reports = [report] if self._save.team.world == 1 else self._reports()
            if reports is not None:
                self._save.commit(reports)
        except BaseException as error:
            self._commit_error = error
            _log(error)

    def _leave(self, report: dict[str, Any]) -> None:
        """Puts down what rank 0 looks for. Raises OSError."""
        if self._save.team.world == 1:
            return
        path = self._report_of(self._save.team.rank)
        unfinished = path.with_suffix(".part")
        unfinished.unlink(missing_ok=True)
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            write_all(descriptor, memoryview(json.dumps(report).encode()))
        finally:
            os.close(descriptor)
        os.rename(unfinished, path)

    def _report_of(self, rank: int) -> Path:
        return self._save.aside / f"{REPORT}{rank:05}.json"

    def _reports(self) -> list[dict[str, Any]] | None:
        """The reports of all ranks when they are there; then they are removed. None if the save is given up.

        Raises CheckpointError if a rank has failed, or has ended without a report.
        """
        paths = [self._report_of(rank) for rank in range(self._save.team.world)]
        grown, since = -1, time.monotonic()
        while not all(path.exists() for path in paths):
            if self._stop.wait(POLL_SECONDS):
                return None
            if threading.main_thread().is_alive() and not self._alone.is_set():
                continue
            size = _size(self._save.aside)
            if size != grown:
                grown, since = size, time.monotonic()
            elif time.monotonic() - since > PATIENCE_SECONDS:
                missing = next(rank for rank, path in enumerate(paths) if not path.exists())
                raise CheckpointError(
                    f"checkpoint {self._save.tag} was not saved to {self._save.save_dir}: rank {missing} ended before "
                    "its part was written; checkpoints saved before are intact",
                    path=self.target,
                )
        reports = [json.loads(path.read_bytes()) for path in paths]
        for rank, report in enumerate(reports):
            if "error" in report:
                raise CheckpointError(f"rank {rank}: {report['error']}", path=self.target)
        for path in paths:
            path.unlink()
        return reports

    def conclude(self, *, meet: bool) -> None:
        """Waits for the end, on all ranks if they `meet`; then all raise what one of them does."""
        team = self._save.team
        self._hurry.set()
        try:
            if meet and team.world > 1:
                self._written.wait()
                # First whether all have written: a rank that could not even say so leaves rank 0 waiting.
                team.together(lambda: _raise(self._write_error), self.target)
                self._writing.join()
                team.together(lambda: _raise(self._commit_error), self.target)
            else:
                self._alone.set()
                self._writing.join()
                _raise(self._write_error)
                _raise(self._commit_error)
        finally:
            self._stop.set()
            self._writing.join()
            self._capturing.join()
            self._save.close()


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error


def _log(error: BaseException) -> str:
    """Writes an error where it is seen also if the program ends without asking; returns its line."""
    line = str(error) if isinstance(error, CheckpointError) else repr(error)
    logger.error("%s", line)
    return line


def _size(directory: Path) -> int:
    size = 0
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size

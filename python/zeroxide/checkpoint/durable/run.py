"""One durable run on this rank: when it commits, and how it goes on from the last commit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from zeroxide import _core
from zeroxide.checkpoint.agree import Team
from zeroxide.checkpoint.durable import note
from zeroxide.errors import CheckpointError

if TYPE_CHECKING:
    from zeroxide.engine.training_state import TrainingState

__all__ = ["DurableRun"]

logger = logging.getLogger("zeroxide")


class DurableRun:
    """Commits every `training.durable_every` optimizer steps, on all ranks together.

    before_commit: called before each commit; returns when nobody needs the one before any more.
    """

    def __init__(self, training: TrainingState, before_commit: Callable[[], None]) -> None:
        self._training = training
        self._commits = _core.Commits(training.core)
        self._team = Team(training.ranks)
        self._found = training.committed_note
        self._before_commit = before_commit
        self._current = False
        self.client_state: dict[str, Any] = {}
        self.stats = {"commits": 0, "seconds": 0.0}
        training.on_change(self._changed)

    def _changed(self) -> None:
        self._current = False

    @property
    def waits_for_resume(self) -> bool:
        """Whether an earlier run has left a commit that nobody has said what to do with."""
        return self._found is not None

    def check_resumed(self) -> None:
        """Raises CheckpointError where a step would be the first of two runs in one place."""
        if self._found is not None:
            step = note.step_of(self._found)
            raise CheckpointError(
                f"{self._training.durable_path} has step {step} of a run: call engine.resume() before the first step "
                "to go on with it, or start anew with another zeroxide.durable_name or without that directory",
                path=self._training.durable_path,
            )

    def resume(self) -> int:
        """Makes all state what the last commit says. Returns its step; 0, with nothing changed, where there is none."""
        found, training = self._found, self._training
        if found is None:
            return 0
        self._team.together(lambda: note.check(training, found), training.durable_path)
        training.release_all()
        training.forget_residuals()
        training.core.clear_gradients()
        self._team.together(self._commits.roll_back, training.durable_path)
        training.weights_renewed()
        self.client_state = note.client_state_of(found)
        self._team.together(lambda: note.restore(training, found), training.durable_path)
        self._found = None
        self._current = True
        step = note.step_of(found)
        if self._team.leads:
            path = training.durable_path
            logger.warning("goes on from step %d in %s: its weights replace those that the model came with", step, path)
        return step

    def after_step(self) -> None:
        """Commits if it is time to."""
        if self._training.counters.global_steps % self._training.durable_every == 0:
            self.commit()

    def commit(self) -> None:
        """Commits all state as it is now. Every rank calls it. Raises StorageError, CheckpointError."""
        start = time.perf_counter()
        self._before_commit()
        training = self._training
        prepared = self._team.together(
            lambda: self._commits.prepare(note.words(training, self.client_state)), training.durable_path
        )
        assert len(set(prepared)) == 1, f"ranks have prepared different commits: {prepared}"
        # From here on every rank has this commit, whichever of them ends: the one before may go.
        self._commits.conclude()
        self._current = True
        self.stats["commits"] += 1
        self.stats["seconds"] += time.perf_counter() - start

    def reads(self) -> _core.CommittedReads | None:
        """A reader of all state as it is now, which has been committed; None while gradients wait for a step, which no
        commit holds. Every rank calls it."""
        training = self._training
        if self._found is not None or training.inside_window() or training.unused_gradients():
            return None
        # Parameters that always show their values may have been changed without a word.
        if not self._current or training.shows_weights:
            self.commit()
        return self._commits.reads()

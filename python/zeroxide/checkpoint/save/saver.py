"""All saves of an engine, one after the other: at once, or beside training."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zeroxide import _core
from zeroxide.checkpoint.format.durable_file import WRITE_MEMORY
from zeroxide.checkpoint.save.background import BackgroundSave
from zeroxide.checkpoint.save.save import Save, save_checkpoint
from zeroxide.checkpoint.save.snapshot import available_memory

if TYPE_CHECKING:
    from zeroxide.engine.training_state import TrainingState

__all__ = ["Saver"]


class Saver:
    """All saves of one engine on this rank, at most one of them under way, and what they took.

    reads: gives a reader of the state as a durable run has committed it, None where it cannot.
    """

    def __init__(
        self, training: TrainingState, reads: Callable[[], _core.CommittedReads | None] = lambda: None
    ) -> None:
        self._training = training
        self._reads = reads
        self._under_way: BackgroundSave | None = None
        training.on_change(self.before_update)
        self._stats = {"saves": 0, "bytes": 0, "seconds_stopped": 0.0, "seconds_writing": 0.0, "memory_peak": 0}

    def save(
        self,
        save_dir: Path,
        tag: str | None,
        client_state: dict[str, Any],
        save_latest: bool,
        include_frozen: bool,
        leave_out_gradients: bool,
    ) -> Path:
        """A save as the config says: in the background, or done when this returns. Concludes the one before."""
        start = time.perf_counter()
        try:
            self.conclude()
            asked = (self._training, save_dir, tag, client_state, save_latest, include_frozen, leave_out_gradients)
            source = self._reads()
            if source is not None:
                path = self._begin(asked, source)
            elif not self._training.in_background:
                path, size = save_checkpoint(*asked)
                self._stats["bytes"] += size
                self._stats["seconds_writing"] += time.perf_counter() - start
            else:
                path = self._begin(asked, None)
            self._stats["saves"] += 1
            return path
        finally:
            self._stats["seconds_stopped"] += time.perf_counter() - start

    def _begin(self, asked: tuple[Any, ...], source: _core.CommittedReads | None) -> Path:
        try:
            save = Save(*asked, frozen_in_time=True)
            # What is read from a commit waits nowhere: two chunks are enough to read one while the other is written.
            memory = 0 if source is not None else self._memory(save)
            self._under_way = BackgroundSave(self._training, save, memory, source)
        except BaseException:
            if source is not None:
                source.close()
            raise
        return save.target

    def _memory(self, save: Save) -> int:
        room = self._training.staging_memory
        if room is None:
            room = available_memory() // 2 // self._training.ranks.local_world
        # What is on its way to the disk has left the snapshot, and takes memory still.
        return min(max(0, room - WRITE_MEMORY), save.description.bytes)

    def before_update(self) -> None:
        """Waits until the state of parameters may change. What fails is kept for `conclude`."""
        if self._under_way is not None and not self._under_way.reads_commit:
            self._wait_until_captured(self._under_way)

    def before_commit(self) -> None:
        """Waits until nobody reads the last commit any more. What fails is kept for `conclude`."""
        if self._under_way is not None and self._under_way.reads_commit:
            self._wait_until_captured(self._under_way)

    def _wait_until_captured(self, under_way: BackgroundSave) -> None:
        start = time.perf_counter()
        under_way.wait_until_captured()
        self._stats["seconds_stopped"] += time.perf_counter() - start

    def conclude(self) -> Path | None:
        """Waits for the save under way; its path, or None. Raises CheckpointError if it failed, once, on all ranks."""
        return self._end(meet=True)

    def finish(self) -> None:
        """Like `conclude`, without meeting the other ranks: raises what is known on this one."""
        self._end(meet=False)

    def _end(self, *, meet: bool) -> Path | None:
        background, self._under_way = self._under_way, None
        if background is None:
            return None
        start = time.perf_counter()
        try:
            background.conclude(meet=meet)
            return background.target
        finally:
            self._stats["seconds_stopped"] += time.perf_counter() - start
            self._stats["bytes"] += background.bytes
            self._stats["seconds_writing"] += background.seconds
            self._stats["memory_peak"] = max(self._stats["memory_peak"], background.slabs.peak)

    def stats(self) -> dict[str, Any]:
        """Numbers so far; see `Engine.checkpoint_stats`."""
        now = self._under_way
        memory = 0 if now is None else now.slabs.held
        return {**self._stats, "memory": memory, "under_way": now is not None and now.is_alive()}

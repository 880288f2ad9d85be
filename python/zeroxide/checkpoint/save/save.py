"""Saving: every rank writes its own files aside, and they become the checkpoint by one rename of rank 0."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from zeroxide.checkpoint.agree import Team
from zeroxide.checkpoint.format import commit
from zeroxide.checkpoint.format.manifest import SavedFile
from zeroxide.checkpoint.format.stream import StreamWriter
from zeroxide.checkpoint.live_state import LiveState, Staging
from zeroxide.checkpoint.save.description import Description
from zeroxide.checkpoint.save.reports import manifest_text, report
from zeroxide.checkpoint.save.values import values
from zeroxide.errors import CheckpointError

if TYPE_CHECKING:
    from zeroxide.engine.training_state import TrainingState

__all__ = ["Save", "save_checkpoint"]

T = TypeVar("T")
MIB = 1 << 20


def save_checkpoint(
    training: TrainingState,
    save_dir: Path,
    tag: str | None,
    client_state: dict[str, Any],
    save_latest: bool,
    include_frozen: bool,
    leave_out_gradients: bool = False,
) -> tuple[Path, int]:
    """Writes `save_dir/tag` (`global_step<N>` if the tag is None), whole or not at all.

    Returns that path, and the bytes of state that this rank wrote.

    Every rank must call it with the same arguments; `client_state` is rank 0's. Raises CheckpointError on all ranks,
    with every earlier checkpoint as it was, when gradients are being accumulated, unless they are to be left out, when
    something is not JSON, when
    the ranks disagree, or when the files of any rank cannot be written.
    """
    asked = (training, save_dir, tag, client_state, save_latest, include_frozen, leave_out_gradients)
    save = Save(*asked, frozen_in_time=False)
    live = LiveState(training, Staging())
    try:
        reports = save.team.together(lambda: save.write(values(save.description, live)), save.target)
        save.team.together(lambda: save.commit(reports), save.target)
    finally:
        save.close()
    return save.target, save.description.payload


class Save:
    """One save between its start and its end, on this rank.

    Making it (on every rank) checks everything that can be checked beforehand and opens the directory aside.
    `write` and `commit` may run in another thread; `close` ends it in any case.
    """

    def __init__(
        self,
        training: TrainingState,
        save_dir: Path,
        tag: str | None,
        client_state: dict[str, Any],
        save_latest: bool,
        include_frozen: bool,
        leave_out_gradients: bool = False,
        *,
        frozen_in_time: bool,
    ) -> None:
        self.team = Team(training.world)
        self.tag = f"global_step{training.counters.global_steps}" if tag is None else str(tag)
        self.save_dir = save_dir
        self.target = save_dir / self.tag
        self._save_latest = save_latest
        self._held_aside: commit.Aside | None = None

        leader = training.ranks.number(0)

        def describe() -> dict[str, Any]:
            training.core.check_usable()
            commit.check_tag(self.tag, save_dir)
            if not leave_out_gradients:
                _check_boundary(training)
            self.description = Description(
                training, client_state, include_frozen, self.team.rank, self.team.world, frozen_in_time=frozen_in_time
            )
            asked = {
                "tag": self.tag,
                "exclude_frozen_parameters": not include_frozen,
                "step": training.counters.global_steps,
                "optimizer groups": len(training.optimizer.param_groups),
            }
            return {"bytes": self.description.bytes, "asked": asked, "leader": leader, "has": self.description.has()}

        found = self.team.together(describe, self.target)
        self.team.same([each["asked"] for each in found], "save different checkpoints", self.target)
        # What several parts of the model have, such as a tied weight, is saved by the first of them.
        self.description.leave_out({name for each in found if each["leader"] < leader for name in each["has"]})
        self.bytes: int = sum(each["bytes"] for each in found)
        """Room that the whole checkpoint takes, rounded up."""
        try:
            name = self.team.together(self._open_aside, self.target)[0]
            assert name is not None, "rank 0 has opened a directory"
            self.aside = save_dir / name
            self.team.together(self._check_shared, self.target)
            training.forget_residuals()
        except BaseException:
            self.close()
            raise

    def _open_aside(self) -> str | None:
        if not self.team.leads:
            return None

        def act() -> str:
            commit.prepare(self.save_dir, self.tag)
            _check_room(self.save_dir, self.bytes)
            self._held_aside = commit.Aside(self.save_dir, self.tag)
            return self._held_aside.path.name

        return self._explained(act)

    def _check_shared(self) -> None:
        if not self.aside.is_dir():
            raise CheckpointError(
                f"{self.aside} of rank 0 is not there: save_dir must be on a file system that all ranks share",
                path=self.target,
            )

    def write(self, chunks: Iterator[torch.Tensor]) -> dict[str, Any]:
        """Writes the files of this rank, makes them durable and returns the report of them. Raises CheckpointError."""
        return self._explained(lambda: report(self.description, list(self._write_files(chunks))))

    def _write_files(self, chunks: Iterator[torch.Tensor]) -> Iterator[SavedFile]:
        for name, cuts in self.description.files:
            with StreamWriter(self.aside / name, [cut.entry for cut in cuts], {}) as writer:
                left = sum(cut.count for cut in cuts)
                while left:
                    chunk = next(chunks)
                    writer.write(chunk)
                    left -= chunk.numel()
                    # Not held any longer than its turn lasts.
                    del chunk
                # Tensors without elements have their turn as well.
                checksum = writer.finish()
            yield SavedFile(name=name, bytes=writer.bytes, crc64nvme=checksum)

    def commit(self, reports: Sequence[dict[str, Any]]) -> None:
        """On rank 0, makes what all ranks wrote the checkpoint. Raises CheckpointError."""
        held = self._held_aside
        if held is not None:
            text = manifest_text(self.description, reports)
            self._explained(lambda: held.commit(text, latest=self._save_latest))

    def close(self) -> None:
        """Ends the save; without a commit, removes what was written. No rank may still be writing. Idempotent."""
        held, self._held_aside = self._held_aside, None
        if held is not None:
            held.close()

    def _explained(self, act: Callable[[], T]) -> T:
        try:
            return act()
        except OSError as error:
            raise CheckpointError(self._line(error), path=self.target) from error

    def _line(self, error: OSError) -> str:
        reason = f"{error.strerror or error}" + (f" at {error.filename}" if error.filename else "")
        if self._held_aside is not None and self._held_aside.committed:
            return f"checkpoint {self.tag} is in {self.save_dir}, but `latest` still names the one before: {reason}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += f" (it takes {self.bytes / MIB:.1f} MiB)"
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason += ": the path to save to leads through a file"
        return f"checkpoint {self.tag} was not saved to {self.save_dir}: {reason}; checkpoints saved before are intact"


def _check_boundary(training: TrainingState) -> None:
    steps, inside, accumulated = training.accumulation_steps, training.inside_window(), training.unused_gradients()
    if not accumulated and not inside:
        return
    where = (
        f"after micro-batch {inside} of {steps}" if inside else f"with {accumulated} gradients that no step has used"
    )
    raise CheckpointError(
        f"a checkpoint cannot be saved {where}: gradients are not part of it; save after the step() that updates "
        "the weights"
    )


def _check_room(save_dir: Path, need: int) -> None:
    found = os.statvfs(save_dir)
    free = found.f_bavail * found.f_frsize
    # Some network file systems report no size at all.
    if found.f_blocks and need > free:
        raise CheckpointError(
            f"no room for a checkpoint in {save_dir}: it takes {need / MIB:.1f} MiB, {free / MIB:.1f} MiB are free",
            path=save_dir,
        )

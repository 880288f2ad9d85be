"""Where a run goes on: from its last commit on disk, where it makes such, or from its newest checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from zeroxide.cli.training.run_folder import Record
from zeroxide.cli.training.running import Running
from zeroxide.errors import CheckpointError, ConfigError

__all__ = ["durable_name", "go_on", "note_for_commit"]


def durable_name(folder: Path) -> str:
    """Name by which the run in `folder` finds its commits: another folder's run has another, on the same disk, too."""
    return "train-" + hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()


def note_for_commit(this: Running) -> None:
    """Has the commit that the step under way may make say where the run is after it."""
    if this.options.durable_every:
        this.engine.client_state.update(step=this.step + 1, corpus=this.data.corpus_digest)


def go_on(this: Running, record: Record) -> None:
    """Brings the run to where it was. Raises CheckpointError, ConfigError."""
    if this.options.durable_every:
        if this.engine.resume():
            _at(this, record, this.engine.client_state, this.options.offload.partition(":")[2])
            return
        this.reporter.say(f"no commit of this run under {this.options.offload}: it goes on from its newest checkpoint")
    folder = this.folder
    if not folder.checkpoints():
        raise CheckpointError(f"--resume: {folder.path} holds no checkpoint", path=folder.checkpoint_folder)
    path, state = this.engine.load_checkpoint(str(folder.checkpoint_folder))
    if path is None:
        raise CheckpointError(f"--resume: no checkpoint could be loaded from {folder.checkpoint_folder}")
    _at(this, record, state, path)
    this.saved_step = this.step


def _at(this: Running, record: Record, state: Any, path: str) -> None:
    step = state.get("step") if isinstance(state, dict) else None
    if not isinstance(step, int) or state.get("corpus") != record.corpus_digest:
        raise CheckpointError(f"{path} was not written by this run", path=path)
    this.step = step
    this.loaded = True
    if step >= this.options.steps:
        raise ConfigError(f"the run is at step {step} of {this.options.steps} already; give more --steps", path="steps")

"""Saving: everything is written aside, made durable, and becomes the checkpoint by one rename."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zeroxide import _core
from zeroxide.checkpoint import commit, cutting, generators
from zeroxide.checkpoint.contents import PARTS, Held, LiveState, Staging, held_parameters, persistent_buffers
from zeroxide.checkpoint.cutting import Cut, Tensor, cut_into_files
from zeroxide.checkpoint.manifest import (
    MANIFEST,
    Counters,
    Group,
    Manifest,
    Piece,
    SavedBuffer,
    SavedFile,
    SavedLossScale,
    SavedParameter,
    SavedScheduler,
)
from zeroxide.checkpoint.plain import encode
from zeroxide.checkpoint.stream import StreamWriter, dtype_name, write_all
from zeroxide.errors import CheckpointError

if TYPE_CHECKING:
    from zeroxide.engine import Engine

__all__ = ["save_checkpoint"]

MIB = 1 << 20
ROOM_FOR_HEADERS = 1 * MIB


def save_checkpoint(
    engine: Engine,
    save_dir: Path,
    tag: str | None,
    client_state: dict[str, Any],
    save_latest: bool,
    include_frozen: bool,
) -> Path:
    """Writes `save_dir/tag` (`global_step<N>` if the tag is None), whole or not at all, and returns that path.

    Raises CheckpointError, with every earlier checkpoint as it was, when gradients are being accumulated, when
    something is not JSON, or when the files cannot be written.
    """
    tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
    commit.check_tag(tag, save_dir)
    _check_boundary(engine)
    pending = _Pending(engine, client_state, include_frozen)
    committed = False
    try:
        commit.make_directory(save_dir)
        with commit.locked(save_dir):
            commit.tidy(save_dir)
        commit.check_target(save_dir / tag)
        _check_room(save_dir, pending.bytes)
        aside = commit.Aside(save_dir)
        try:
            pending.write(aside.path)
            with commit.locked(save_dir):
                commit.tidy(save_dir)
                replaced = commit.publish(aside.path, save_dir, tag)
                committed = True
                if save_latest:
                    commit.set_latest(save_dir, tag)
                if replaced is not None:
                    commit.discard(replaced)
        finally:
            aside.close(remove=not committed)
    except OSError as error:
        raise CheckpointError(_line(error, save_dir, tag, pending.bytes, committed), path=save_dir / tag) from error
    return save_dir / tag


def _line(error: OSError, save_dir: Path, tag: str, need: int, committed: bool) -> str:
    reason = f"{error.strerror or error}" + (f" at {error.filename}" if error.filename else "")
    if committed:
        return f"checkpoint {tag} is in {save_dir}, but `latest` still names the one before: {reason}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason += f" (it takes {need / MIB:.1f} MiB)"
    if isinstance(error, FileExistsError | NotADirectoryError):
        reason += ": the path to save to leads through a file"
    return f"checkpoint {tag} was not saved to {save_dir}: {reason}; checkpoints saved before are intact"


def _check_boundary(engine: Engine) -> None:
    steps = engine.gradient_accumulation_steps()
    _, _, landed = engine._alive().grad_norm()
    inside = engine.micro_steps % steps if engine._boundary is None else 0
    if not landed and not inside:
        return
    where = f"after micro-batch {inside} of {steps}" if inside else f"with {landed} gradients that no step has used"
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


class _Pending:
    """A checkpoint described and not yet written. Making it changes nothing and finds what is not JSON."""

    def __init__(self, engine: Engine, client_state: dict[str, Any], include_frozen: bool) -> None:
        self._engine = engine
        self._core = engine._alive()
        if not isinstance(client_state, dict):
            raise CheckpointError(f"client_state must be a dict, got {type(client_state).__name__}")
        self._client_state = encode(client_state, "client_state")
        self._scheduler = _scheduler(engine.lr_scheduler)
        scale = engine._scaler.state_dict()
        self._loss_scale = None if scale is None else SavedLossScale(**scale)
        self._groups = [
            Group(hyperparameters=encode(group, f"optimizer group {number}"))
            for number, group in enumerate(engine.optimizer.hyperparameters())
        ]
        self._held = held_parameters(engine)
        self._buffers = persistent_buffers(engine.module)
        for name, buffer in self._buffers.items():
            if dtype_name(buffer.dtype) is None:
                raise CheckpointError(f"buffer {name} has dtype {buffer.dtype}, which safetensors files cannot hold")
        self._files = [
            (f"{family}-{number:05}.safetensors", cuts)
            for family, tensors in self._families(engine._plan.compute, include_frozen)
            for number, cuts in enumerate(cut_into_files(tensors, cutting.FILE_BYTES, pieces=True), 1)
        ]
        payload = sum(cut.entry.bytes for _, cuts in self._files for cut in cuts)
        self.bytes = payload + ROOM_FOR_HEADERS
        """Room that the checkpoint takes, rounded up."""

    def _families(self, compute: torch.dtype, include_frozen: bool) -> list[tuple[str, list[Tensor]]]:
        # A frozen weight has no more bits than its live form; a trainable one has those of its fp32 master.
        weights = [
            Tensor(held.name, torch.float32 if held.trainable else compute, held.shape)
            for held in self._held
            if held.trainable or include_frozen
        ]
        moments = [Tensor(held.name, torch.float32, held.shape) for held in self._held if held.trainable]
        buffers = [Tensor(name, buffer.dtype, tuple(buffer.shape)) for name, buffer in self._buffers.items()]
        return [("weights", weights), ("exp_avg", moments), ("exp_avg_sq", moments), ("buffers", buffers)]

    def write(self, directory: Path) -> None:
        """Writes all files and makes them and their names durable. Raises OSError."""
        live = LiveState(self._core, self._engine._plan.tile_elements, Staging())
        by_name = {held.name: held for held in self._held}
        written = []
        pieces: dict[tuple[str, str], list[Piece]] = {}
        for name, cuts in self._files:
            family = name.partition("-")[0]
            with StreamWriter(directory / name, [cut.entry for cut in cuts], {}) as writer:
                for cut in cuts:
                    self._write_cut(writer, family, cut, by_name, live)
                checksum = writer.finish()
            written.append(SavedFile(name=name, bytes=writer.bytes, blake2b=checksum))
            for cut in cuts:
                pieces.setdefault((family, cut.tensor.name), []).append(_piece(name, cut))
        self._write_manifest(directory / MANIFEST, self._manifest(pieces, written))
        commit.sync_directory(directory)

    def _write_cut(
        self, writer: StreamWriter, family: str, cut: Cut, by_name: dict[str, Held], live: LiveState
    ) -> None:
        if family not in PARTS:
            whole = self._buffers[cut.tensor.name].detach().contiguous().reshape(-1)
            writer.write(whole[cut.start : cut.start + cut.count])
            return
        for values in live.chunks(by_name[cut.tensor.name], family, cut.start, cut.count, cut.tensor.dtype):
            writer.write(values)

    def _manifest(self, pieces: dict[tuple[str, str], list[Piece]], files: list[SavedFile]) -> Manifest:
        engine = self._engine
        return Manifest(
            zeroxide=_core.__version__,
            precision=engine.config.precision,
            state_format=engine._plan.format,
            counters=Counters(
                global_steps=engine.global_steps,
                global_samples=engine.global_samples,
                micro_steps=engine.micro_steps,
                skipped_steps=engine.skipped_steps,
            ),
            groups=self._groups,
            scheduler=self._scheduler,
            loss_scale=self._loss_scale,
            generators=generators.read(),
            client_state=self._client_state,
            parameters=[
                SavedParameter(
                    names=list(held.names),
                    shape=list(held.shape),
                    trainable=held.trainable,
                    updates=self._core.updates(held.unit, held.position),
                    group=held.group,
                    weights=pieces.get(("weights", held.name), []),
                    exp_avg=pieces.get(("exp_avg", held.name), []),
                    exp_avg_sq=pieces.get(("exp_avg_sq", held.name), []),
                )
                for held in self._held
            ],
            buffers=[
                SavedBuffer(name=name, shape=list(buffer.shape), pieces=pieces[("buffers", name)])
                for name, buffer in self._buffers.items()
            ],
            files=files,
        )

    @staticmethod
    def _write_manifest(path: Path, manifest: Manifest) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            write_all(descriptor, memoryview(manifest.text().encode()))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _piece(file: str, cut: Cut) -> Piece:
    entry = cut.entry
    return Piece(
        file=file, key=entry.key, start=cut.start, count=cut.count, dtype=dtype_name(entry.dtype) or str(entry.dtype)
    )


def _scheduler(scheduler: Any) -> SavedScheduler | None:
    if scheduler is None:
        return None
    kind = type(scheduler).__name__
    if not hasattr(scheduler, "state_dict"):
        raise CheckpointError(f"the lr_scheduler {kind} has no state_dict(): its position cannot be saved")
    return SavedScheduler(kind=kind, state=encode(scheduler.state_dict(), f"{kind}.state_dict()"))

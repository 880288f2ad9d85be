"""What a checkpoint will hold, fixed at the moment of the save: everything but the values of the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from zeroxide import _core
from zeroxide.checkpoint.contents import (
    WEIGHTS,
    ElementRange,
    LiveState,
    own_pieces,
    param_records,
    persistent_buffers,
    state_names,
)
from zeroxide.checkpoint.format import cutting, generators
from zeroxide.checkpoint.format.cutting import Cut, Tensor, cut_into_files, whole
from zeroxide.checkpoint.format.json_codec import encode
from zeroxide.checkpoint.format.manifest import (
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
from zeroxide.checkpoint.format.stream import saved_name
from zeroxide.errors import CheckpointError
from zeroxide.optim.groups import plain
from zeroxide.precision.bits import bytes_of, copy_of, why_not_bytes

if TYPE_CHECKING:
    from zeroxide.engine.training_state import TrainingState

__all__ = ["BUFFERS", "Description"]

BUFFERS = "buffers"
ROOM_FOR_HEADERS = 1 << 20


class Description:
    """The files that this rank will write and the manifest without them. Making it changes nothing.

    `frozen_in_time`: buffers are copied, since training goes on before they are written.
    Raises CheckpointError for what is not JSON or has no form in a file.
    """

    def __init__(
        self,
        training: TrainingState,
        client_state: dict[str, Any],
        include_frozen: bool,
        rank: int,
        world: int,
        *,
        frozen_in_time: bool,
    ) -> None:
        self._leads = rank == 0
        self._held = param_records(training)
        own = own_pieces(training, self._held)
        self._by_name = {held.name: held for held in self._held}
        self._states = state_names(self._held)
        self._buffers = self._checked_buffers(training, frozen_in_time)
        self.generators = generators.read()
        if self._leads:
            # What only rank 0 writes, only rank 0 need be able to write.
            self._frame = _frame(training, client_state)
            self._updates = [training.core.updates(held.unit, held.position) for held in self._held]
        mark = f"rank{rank:05}-" if world > 1 else ""
        self.files = [
            (f"{family}-{mark}{number:05}.safetensors", cuts)
            for family, wanted in self._families(own, include_frozen)
            for number, cuts in enumerate(cut_into_files(wanted, cutting.FILE_BYTES, pieces=True), 1)
        ]
        self.payload = sum(cut.entry.bytes for _, cuts in self.files for cut in cuts)
        """Bytes of this rank's tensors."""
        self.bytes = self.payload + ROOM_FOR_HEADERS
        """Room that this rank's part takes, rounded up."""

    @staticmethod
    def _checked_buffers(training: TrainingState, frozen_in_time: bool) -> dict[str, torch.Tensor]:
        buffers = persistent_buffers(training.module)
        for name, buffer in buffers.items():
            problem = why_not_bytes(buffer)
            if problem is not None:
                raise CheckpointError(
                    f"buffer {name} {problem}, which no checkpoint can hold: register it with persistent=False"
                )
        return {name: copy_of(buffer) for name, buffer in buffers.items()} if frozen_in_time else buffers

    def _families(self, own: Sequence[ElementRange], include_frozen: bool) -> Iterator[tuple[str, list[Cut]]]:
        # A frozen weight has no more bits than its live form; a trainable one has those of its fp32 master.
        weights = {
            held.name: Tensor(held.name, held.dtype, held.shape)
            for held in self._held
            if held.trainable or include_frozen
        }
        families = [(WEIGHTS, weights)]
        for state in self._states:
            having = [held for held in self._held if state in held.states]
            families.append((state, {held.name: Tensor(held.name, torch.float32, held.shape) for held in having}))
        for family, tensors in families:
            yield (
                family,
                [Cut(tensors[run.held.name], run.start, run.count) for run in own if run.held.name in tensors],
            )
        if self._leads:
            yield BUFFERS, whole(Tensor(name, each.dtype, tuple(each.shape)) for name, each in self._buffers.items())

    def values(self, live: LiveState) -> Iterator[torch.Tensor]:
        """The elements of all files, in order, as they are stored. Each tensor is valid until the next one is taken."""
        for name, cuts in self.files:
            family = name.partition("-")[0]
            for cut in cuts:
                if family != BUFFERS:
                    held = self._by_name[cut.tensor.name]
                    yield from live.chunks(held, family, cut.start, cut.count, cut.tensor.dtype)
                else:
                    flat = bytes_of(self._buffers[cut.tensor.name]).view(cut.tensor.dtype)
                    yield flat[cut.start : cut.start + cut.count]

    def report(self, written: Sequence[SavedFile]) -> dict[str, Any]:
        """What rank 0 needs to know of the files of this rank, as JSON."""
        pieces = [
            [name.partition("-")[0], cut.tensor.name, _piece(name, cut).model_dump()]
            for name, cuts in self.files
            for cut in cuts
        ]
        return {"files": [each.model_dump() for each in written], "pieces": pieces, "generators": self.generators}

    def manifest_text(self, reports: Sequence[dict[str, Any]]) -> str:
        """The whole manifest from the reports of all ranks, in rank order, as it is written. Only on rank 0."""
        pieces: dict[tuple[str, str], list[Piece]] = {}
        for report in reports:
            for family, name, piece in report["pieces"]:
                pieces.setdefault((family, name), []).append(Piece(**piece))
        for found in pieces.values():
            found.sort(key=lambda piece: piece.start)
        manifest = Manifest(
            **self._frame,
            generators=[report["generators"] for report in reports],
            parameters=[
                SavedParameter(
                    names=list(held.names),
                    shape=list(held.shape),
                    trainable=held.trainable,
                    opaque=held.opaque,
                    updates=updates,
                    group=held.group,
                    weights=pieces.get((WEIGHTS, held.name), []),
                    state={name: pieces[name, held.name] for name in held.states if (name, held.name) in pieces},
                )
                for held, updates in zip(self._held, self._updates, strict=True)
            ],
            buffers=[
                SavedBuffer(name=name, shape=list(buffer.shape), pieces=pieces[BUFFERS, name])
                for name, buffer in self._buffers.items()
            ],
            files=[SavedFile(**file) for report in reports for file in report["files"]],
        )
        # A hole here would be a fault of ours, and must not become a checkpoint.
        manifest.check()
        return manifest.text()


def _frame(training: TrainingState, client_state: dict[str, Any]) -> dict[str, Any]:
    """Everything of the manifest that does not speak of tensors."""
    if not isinstance(client_state, dict):
        raise CheckpointError(f"client_state must be a dict, got {type(client_state).__name__}")
    counters, scale = training.counters, training.loss_scaler.state_dict()
    return {
        "zeroxide": _core.__version__,
        "precision": training.precision,
        "state_format": training.format,
        "counters": Counters(
            global_steps=counters.global_steps,
            global_samples=counters.samples,
            micro_steps=counters.micro_steps,
            skipped_steps=counters.skipped_steps,
        ),
        "client_state": encode(client_state, "client_state"),
        "scheduler": _scheduler(training.lr_scheduler),
        "loss_scale": None if scale is None else SavedLossScale(**scale),
        "groups": [
            Group(hyperparameters=encode(group, f"optimizer group {number}"))
            for number, group in enumerate(training.optimizer.hyperparameters())
        ],
    }


def _piece(file: str, cut: Cut) -> Piece:
    entry = cut.entry
    return Piece(file=file, key=entry.key, start=cut.start, count=cut.count, dtype=saved_name(cut.tensor.dtype))


def _scheduler(scheduler: Any) -> SavedScheduler | None:
    if scheduler is None:
        return None
    kind = type(scheduler).__name__
    if not hasattr(scheduler, "state_dict"):
        raise CheckpointError(f"the lr_scheduler {kind} has no state_dict(): its position cannot be saved")
    return SavedScheduler(kind=kind, state=encode(plain(scheduler.state_dict()), f"{kind}.state_dict()"))

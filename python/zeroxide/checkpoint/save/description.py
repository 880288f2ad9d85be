"""What a checkpoint will hold, fixed at the moment of the save: everything but the values of the parameters."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch

from zeroxide import _core
from zeroxide.checkpoint.contents import (
    WEIGHTS,
    ElementRange,
    ParamRecord,
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
    SavedLossScale,
    SavedScheduler,
)
from zeroxide.device.placement import in_host
from zeroxide.errors import CheckpointError
from zeroxide.optim.groups import plain
from zeroxide.precision.bits import copy_of, why_not_bytes

if TYPE_CHECKING:
    from zeroxide.engine.training_state import TrainingState

__all__ = ["BUFFERS", "Description", "frame"]

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
        self.in_parts = training.in_parts
        self._leads_part = training.ranks.rank == 0
        self.records = param_records(training)
        own = own_pieces(training, self.records)
        self._own, self._include_frozen = own, include_frozen
        self._by_name: dict[str, list[ParamRecord]] = {}
        for held in sorted(self.records, key=lambda each: each.first):
            self._by_name.setdefault(held.name, []).append(held)
        self._states = state_names(self.records)
        self.buffers = self._checked_buffers(training, frozen_in_time)
        self.generators = generators.read()
        if self._leads:
            # What only rank 0 writes, only rank 0 need be able to write.
            self.frame = frame(training, client_state)
        says = self.records if self._leads or self.in_parts else []
        self.updates = [training.core.updates(held.unit, held.position) for held in says]
        self._mark = f"rank{rank:05}-" if world > 1 else ""
        # Tensor ranks have the same experts, where these are spread.
        elsewhere = self.records if training.experts_elsewhere else []
        self._repeated = {held.name for held in elsewhere if training.units[held.unit].experts}
        self._make_files(frozenset())

    def held(self, cut: Cut) -> tuple[ParamRecord, int]:
        """The parameter whose elements a cut has, and which of them is the cut's first."""
        found = self._by_name[cut.tensor.name]
        # Blocks of rows follow one another, and no cut has elements of two.
        held = found[bisect.bisect_right(found, cut.start, key=lambda each: each.first) - 1]
        return held, cut.start - held.first

    def has(self) -> list[str]:
        """The elements of parameters and the buffers that this rank has a share of, where there are parts."""
        return self._all() if self.in_parts else []

    def _all(self) -> list[str]:
        return [held.elements for held in self.records] + list(self.buffers)

    def leave_out(self, names: Set[str]) -> None:
        """Leaves to others what they have as well, as `has` says it."""
        if not names.isdisjoint(self._all()):
            self._make_files(names)

    def _make_files(self, others: Set[str]) -> None:
        self.others = others
        """What other parts of the model save."""
        self.files = [
            (f"{family}-{self._mark}{number:05}.safetensors", cuts)
            for family, wanted in self._families(self._own, self._include_frozen)
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
        return {name: copy_of(in_host(buffer)) for name, buffer in buffers.items()} if frozen_in_time else buffers

    def _families(self, own: Sequence[ElementRange], include_frozen: bool) -> Iterator[tuple[str, list[Cut]]]:
        # A frozen weight has no more bits than its live form; a trainable one has those of its fp32 master.
        weights = {
            held.name: Tensor(held.name, held.dtype, held.file_shape)
            for held in self.records
            if (held.trainable or include_frozen)
            and held.elements not in self.others
            and held.name not in self._repeated
        }
        families = [(WEIGHTS, weights)]
        for state in self._states:
            having = [held for held in self.records if state in held.states and held.name in weights]
            families.append((state, {held.name: Tensor(held.name, torch.float32, held.file_shape) for held in having}))
        for family, tensors in families:
            yield (
                family,
                [
                    Cut(tensors[run.held.name], run.held.first + run.start, run.count)
                    for run in own
                    if run.held.name in tensors
                ],
            )
        if self._leads or (self.in_parts and self._leads_part):
            mine = {name: each for name, each in self.buffers.items() if name not in self.others}
            yield BUFFERS, whole(Tensor(name, each.dtype, tuple(each.shape)) for name, each in mine.items())


def frame(training: TrainingState, client_state: dict[str, Any]) -> dict[str, Any]:
    """Everything of the manifest that does not speak of tensors. Raises CheckpointError for what is not JSON."""
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


def _scheduler(scheduler: Any) -> SavedScheduler | None:
    if scheduler is None:
        return None
    kind = type(scheduler).__name__
    if not hasattr(scheduler, "state_dict"):
        raise CheckpointError(f"the lr_scheduler {kind} has no state_dict(): its position cannot be saved")
    return SavedScheduler(kind=kind, state=encode(plain(scheduler.state_dict()), f"{kind}.state_dict()"))

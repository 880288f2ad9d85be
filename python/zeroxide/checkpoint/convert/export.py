"""The live weights as a folder of safetensors that Hugging Face loads.

All ranks write into the same files, each the elements that it holds at the place where they belong, so that no rank
ever has a whole tensor. Rank 0 makes the files beforehand and gives them their names at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zeroxide.checkpoint.agree import Team
from zeroxide.checkpoint.contents import ElementRange, ParamRecord, own_pieces, param_records, persistent_buffers
from zeroxide.checkpoint.convert.model_folder import DEFAULT_NAME, ModelFolder, check_exportable, check_name
from zeroxide.checkpoint.format.cutting import Tensor
from zeroxide.checkpoint.live_state import LiveState, Staging
from zeroxide.device.placement import in_host
from zeroxide.errors import ModelError, StorageError
from zeroxide.precision.bits import bytes_of, why_not_bytes

if TYPE_CHECKING:
    from zeroxide.engine.training_state import TrainingState

__all__ = ["save_model"]


def save_model(
    training: TrainingState, save_dir: Path, save_filename: str | None, *, include_frozen: bool = True
) -> Path:
    """Writes weights and persistent buffers with the dtypes they are computed with; returns the file to load.

    Every rank must call it with the same arguments. That file is `save_filename` (default "model.safetensors") or,
    for more than one file of weights, its index. A shared parameter is written once, under its first name.

    Raises ConfigError for a name that does not end in .safetensors, ModelError for a buffer of a dtype that the
    format lacks, StorageError when the files cannot be written: all ranks raise what one does.
    """
    team = Team(training.world)
    name = DEFAULT_NAME if save_filename is None else save_filename
    made: list[_Export] = []

    def plan() -> dict[str, Any]:
        made.append(_Export(training, check_name(name), save_dir, team, include_frozen))
        asked = {"save_filename": name, "exclude_frozen_parameters": not include_frozen}
        return {"asked": asked, "tensors": made[0].told()}

    found = team.together(plan, save_dir)
    team.same([each["asked"] for each in found], "export different models", save_dir)
    made[0].lay_out([each["tensors"] for each in found])
    return made[0].write()


class _Export:
    """What will be written where."""

    folder: ModelFolder

    def __init__(self, training: TrainingState, stem: str, directory: Path, team: Team, include_frozen: bool) -> None:
        self.team = team
        self._stem, self._directory = stem, directory
        self._leader = training.ranks.number(0)
        """The first rank that has this part of the model."""
        self._tells = training.in_parts or team.leads
        self.live = LiveState(training, Staging())
        self.runs: dict[str, list[ElementRange]] = {}
        records = param_records(training)
        for run in own_pieces(training, records):
            self.runs.setdefault(run.held.name, []).append(run)
        self.buffers = persistent_buffers(training.module)
        for name, buffer in self.buffers.items():
            problem = why_not_bytes(buffer)
            if problem is not None:
                raise ModelError(
                    f"buffer {name} {problem}, which safetensors files cannot hold: register it with persistent=False",
                    name=name,
                )
        tensors = [
            Tensor(held.name, training.compute if held.trainable else held.dtype, held.full_shape)
            for held in records
            if held.trainable or include_frozen
        ]
        tensors += [Tensor(name, buffer.dtype, tuple(buffer.shape)) for name, buffer in self.buffers.items()]
        # Blocks of rows of one parameter are one tensor.
        tensors = list(dict.fromkeys(tensors))
        check_exportable(tensors)
        self._tensors = tensors
        self._elements = {held.name: held.elements for held in records}

    def told(self) -> dict[str, Any]:
        """The tensors of this rank's part of the model, as JSON; none where another rank tells of all."""
        tensors = [
            [
                each.name,
                str(each.dtype).removeprefix("torch."),
                list(each.shape),
                self._elements.get(each.name, each.name),
            ]
            for each in self._tensors
        ]
        return {"leader": self._leader, "tensors": tensors if self._tells else []}

    def lay_out(self, told: list[dict[str, Any]]) -> None:
        """Finds the place of every tensor, the same on all ranks. `told`: by all ranks, in rank order."""
        tensors: dict[str, Tensor] = {}
        first: dict[str, int] = {}
        for each in told:
            for name, dtype, shape, elements in each["tensors"]:
                tensors.setdefault(name, Tensor(name, getattr(torch, dtype), tuple(shape)))
                first.setdefault(elements, each["leader"])
        # What several parts of the model have, the first of them writes.
        self.runs = {name: runs for name, runs in self.runs.items() if first.get(self._elements[name]) == self._leader}
        self._writes = {name for name in self.buffers if first[name] == self.team.rank}
        """Buffers that this rank writes: the first that has them."""
        self.folder = ModelFolder(self._directory, self._stem, list(tensors.values()))

    def write(self) -> Path:
        """Writes everything aside, then renames. Raises StorageError."""
        try:
            self._all(lambda: self.folder.make() if self.team.leads else None)
            self._all(self._write_own)
            self._all(lambda: self.folder.publish() if self.team.leads else None)
        finally:
            if self.team.leads:
                self.folder.clean()
        return self.folder.to_load

    def _all(self, act: Callable[[], None]) -> None:
        directory = self.folder.directory

        def explained() -> None:
            try:
                act()
            except OSError as error:
                reason = f"{error.strerror or error}" + (f" at {error.filename}" if error.filename else "")
                raise StorageError(
                    f"the model was not written to {directory}: {reason}", path=directory, errno=error.errno
                ) from error

        self.team.together(explained, directory)

    def _write_own(self) -> None:
        for name, tensors in self.folder.files.items():
            if not any(each.name in self.runs or each.name in self._writes for each in tensors):
                continue
            with self.folder.opened(name) as file:
                for tensor in tensors:
                    buffer = self.buffers.get(tensor.name)
                    if buffer is None:
                        for run in self.runs.get(tensor.name, ()):
                            at = run.start
                            for values in self.live.chunks(run.held, "weights", run.start, run.count, tensor.dtype):
                                for first, place, count in _places(run.held, at, values.numel()):
                                    file.write(tensor, place, values[first - at : first - at + count])
                                at += values.numel()
                    elif tensor.name in self._writes:
                        file.write(tensor, 0, in_host(bytes_of(buffer)).view(buffer.dtype))


def _places(held: ParamRecord, start: int, count: int) -> Iterator[tuple[int, int, int]]:
    """(element, its place in the whole tensor, how many in a row) of elements that these ranks have."""
    if held.region is None:
        yield start, held.first + start, count
    else:
        yield from held.region.runs(start, count)

"""The live weights as a folder of safetensors that Hugging Face loads: cut into files, streamed, each tensor once.

All ranks write into the same files, each the elements that it holds at the place where they belong, so that no rank
ever has a whole tensor. Rank 0 makes the files beforehand, with their headers and their full length.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from zeroxide.checkpoint import cutting
from zeroxide.checkpoint.agree import Team
from zeroxide.checkpoint.commit import make_directory, sync_directory
from zeroxide.checkpoint.contents import (
    LiveState,
    Run,
    Staging,
    held_parameters,
    own_pieces,
    persistent_buffers,
)
from zeroxide.checkpoint.cutting import Tensor, cut_into_files, whole
from zeroxide.checkpoint.stream import bytes_of, dtype_name, header, write_all
from zeroxide.errors import ConfigError, ModelError, StorageError

if TYPE_CHECKING:
    from zeroxide.engine import Engine

__all__ = ["save_model"]

T = TypeVar("T")

DEFAULT_NAME = "model.safetensors"
SUFFIX = ".safetensors"
ASIDE = ".writing-"


def save_model(engine: Engine, save_dir: Path, save_filename: str | None, *, include_frozen: bool = True) -> Path:
    """Writes weights and persistent buffers with the dtypes they are computed with; returns the file to load.

    Every rank must call it with the same arguments. That file is `save_filename` (default "model.safetensors") or,
    for more than one file of weights, its index. A shared parameter is written once, under its first name. While the
    files of an earlier export are being replaced the folder has no index, so a kill in between leaves a folder that
    does not load, never a mixture.

    Raises ConfigError for a name that does not end in .safetensors, ModelError for a buffer of a dtype that the
    format lacks, StorageError when the files cannot be written: all ranks raise what one does.
    """
    team = Team(getattr(engine, "ranks", None))
    name = DEFAULT_NAME if save_filename is None else save_filename
    made: list[_Export] = []

    def plan() -> dict[str, object]:
        if not name.endswith(SUFFIX) or Path(name).name != name or name.startswith("."):
            raise ConfigError(
                f"save_filename {name!r}: expected one file name that ends in {SUFFIX}", path="save_filename", got=name
            )
        made.append(_Export(engine, name.removesuffix(SUFFIX), save_dir, team, include_frozen))
        return {"save_filename": name, "exclude_frozen_parameters": not include_frozen}

    team.same(team.together(plan, save_dir), "export different models", save_dir)
    return made[0].write()


class _Export:
    """What will be written where."""

    def __init__(self, engine: Engine, stem: str, directory: Path, team: Team, include_frozen: bool) -> None:
        self.stem = stem
        self.directory = directory
        self.team = team
        self.live = LiveState(engine._alive(), engine._plan.tile_elements, Staging())
        self.runs: dict[str, list[Run]] = {}
        for run in own_pieces(engine):
            self.runs.setdefault(run.held.name, []).append(run)
        self.buffers = persistent_buffers(engine.module)
        for name, buffer in self.buffers.items():
            if dtype_name(buffer.dtype) is None:
                raise ModelError(
                    f"buffer {name} has dtype {buffer.dtype}, which safetensors files cannot hold", name=name
                )
        tensors = [
            Tensor(held.name, engine._plan.compute, held.shape)
            for held in held_parameters(engine)
            if held.trainable or include_frozen
        ]
        tensors += [Tensor(name, buffer.dtype, tuple(buffer.shape)) for name, buffer in self.buffers.items()]
        shards = cut_into_files(whole(tensors), cutting.FILE_BYTES, pieces=False)
        count = len(shards)
        self.shards = {
            f"{stem}{SUFFIX}" if count == 1 else f"{stem}-{number:05}-of-{count:05}{SUFFIX}": cuts
            for number, cuts in enumerate(shards, 1)
        }
        self.aside = {name: directory / f"{ASIDE}{name}" for name in (*self.shards, self.index)}

    @property
    def index(self) -> str:
        """Name of the index."""
        return f"{self.stem}{SUFFIX}.index.json"

    def write(self) -> Path:
        """Writes everything aside, then renames. Raises StorageError."""
        single = len(self.shards) == 1
        try:
            self._all(lambda: self._make_files() if self.team.leads else None)
            self._all(self._write_own)
            self._all(lambda: self._rename(single) if self.team.leads else None)
        finally:
            if self.team.leads:
                for path in self.aside.values():
                    # On a disk that fails, the first failure is the one to report.
                    with contextlib.suppress(OSError):
                        path.unlink(missing_ok=True)
        return self.directory / (next(iter(self.shards)) if single else self.index)

    def _all(self, act: Callable[[], T]) -> None:
        def explained() -> None:
            try:
                act()
            except OSError as error:
                reason = f"{error.strerror or error}" + (f" at {error.filename}" if error.filename else "")
                raise StorageError(
                    f"the model was not written to {self.directory}: {reason}", path=self.directory, errno=error.errno
                ) from error

        self.team.together(explained, self.directory)

    def _make_files(self) -> None:
        make_directory(self.directory)
        for path in self.aside.values():
            path.unlink(missing_ok=True)  # a killed export's
        for name, cuts in self.shards.items():
            start = header([cut.entry for cut in cuts], {"format": "pt"})
            descriptor = os.open(self.aside[name], os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                write_all(descriptor, memoryview(start))
                # A full disk is found now rather than in the middle.
                _reserve(descriptor, len(start) + sum(cut.entry.bytes for cut in cuts))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _write_own(self) -> None:
        for name, cuts in self.shards.items():
            mine = [cut for cut in cuts if cut.tensor.name in self.runs or self.team.leads]
            if not mine:
                continue
            at = len(header([cut.entry for cut in cuts], {"format": "pt"}))
            descriptor = os.open(self.aside[name], os.O_WRONLY | os.O_CLOEXEC)
            try:
                for cut in cuts:
                    self._write_tensor(descriptor, at, cut.tensor)
                    at += cut.entry.bytes
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _write_tensor(self, descriptor: int, at: int, tensor: Tensor) -> None:
        """The elements of a tensor that this rank holds; the tensor begins at byte `at` of the file."""
        buffer = self.buffers.get(tensor.name)
        if buffer is not None:
            if self.team.leads:
                _write_at(descriptor, bytes_of(buffer.detach().contiguous()), at)
            return
        for run in self.runs.get(tensor.name, ()):
            place = at + run.start * tensor.dtype.itemsize
            for values in self.live.chunks(run.held, "weights", run.start, run.count, tensor.dtype):
                data = bytes_of(values)
                _write_at(descriptor, data, place)
                place += data.nbytes

    def _rename(self, single: bool) -> None:
        directory = self.directory
        if not single:
            _write_text(self.aside[self.index], self._index_text())
        sync_directory(directory)
        if not single:
            # Readers prefer a single file to an index, and an index must not name shards of two exports.
            for old in (directory / f"{self.stem}{SUFFIX}", directory / self.index):
                old.unlink(missing_ok=True)
            sync_directory(directory)
        for name in self.shards:
            os.rename(self.aside[name], directory / name)
        if not single:
            sync_directory(directory)
            os.rename(self.aside[self.index], directory / self.index)
        self._remove_old(directory, single)
        sync_directory(directory)

    def _index_text(self) -> str:
        total = sum(cut.entry.bytes for cuts in self.shards.values() for cut in cuts)
        places = {cut.tensor.name: name for name, cuts in self.shards.items() for cut in cuts}
        return (
            json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"
        )

    def _remove_old(self, directory: Path, single: bool) -> None:
        """Removes shards of earlier exports under the same name, and files that killed ones left."""
        shard = re.compile(f"({re.escape(ASIDE)})?" + re.escape(self.stem) + r"-\d{5}-of-\d{5}" + re.escape(SUFFIX))
        for path in directory.iterdir():
            old = shard.fullmatch(path.name) and path.name not in self.shards
            if old or (single and path.name == self.index):
                path.unlink(missing_ok=True)


def _reserve(descriptor: int, length: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, length)


def _write_at(descriptor: int, data: memoryview, at: int) -> None:
    while data.nbytes:
        count = os.pwrite(descriptor, data, at)
        data, at = data[count:], at + count


def _write_text(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, memoryview(text.encode()))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The live weights as a folder of safetensors that Hugging Face loads: sharded, streamed, each tensor once."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from zeroxide.checkpoint import cutting
from zeroxide.checkpoint.commit import make_directory, sync_directory
from zeroxide.checkpoint.contents import LiveState, Staging, held_parameters, persistent_buffers
from zeroxide.checkpoint.cutting import Cut, Tensor, cut_into_files, whole
from zeroxide.checkpoint.stream import StreamWriter, dtype_name, write_all
from zeroxide.errors import ConfigError, ModelError, StorageError

if TYPE_CHECKING:
    from zeroxide.engine import Engine

__all__ = ["save_model"]

DEFAULT_NAME = "model.safetensors"
SUFFIX = ".safetensors"
ASIDE = ".writing-"


def save_model(engine: Engine, save_dir: Path, save_filename: str | None) -> Path:
    """Writes weights and persistent buffers with the dtypes they are computed with; returns the file to load.

    That file is `save_filename` (default "model.safetensors") or, for more than one shard, its index. A shared
    parameter is written once, under its first name. While shards of an earlier export are being replaced the folder
    has no index, so a kill in between leaves a folder that does not load, never a mixture.

    Raises ConfigError for a name that does not end in .safetensors, ModelError for a buffer of a dtype that the
    format lacks, StorageError when the files cannot be written.
    """
    name = DEFAULT_NAME if save_filename is None else save_filename
    if not name.endswith(SUFFIX) or Path(name).name != name or name.startswith("."):
        raise ConfigError(
            f"save_filename {name!r}: expected one file name that ends in {SUFFIX}", path="save_filename", got=name
        )
    export = _Export(engine, name.removesuffix(SUFFIX))
    try:
        make_directory(save_dir)
        return export.write(save_dir)
    except OSError as error:
        reason = f"{error.strerror or error}" + (f" at {error.filename}" if error.filename else "")
        raise StorageError(
            f"the model was not written to {save_dir}: {reason}", path=save_dir, errno=error.errno
        ) from error


class _Export:
    """What will be written where."""

    def __init__(self, engine: Engine, stem: str) -> None:
        self.stem = stem
        self.live = LiveState(engine._alive(), engine._plan.tile_elements, Staging())
        self.held = {held.name: held for held in held_parameters(engine)}
        self.buffers = persistent_buffers(engine.module)
        for name, buffer in self.buffers.items():
            if dtype_name(buffer.dtype) is None:
                raise ModelError(
                    f"buffer {name} has dtype {buffer.dtype}, which safetensors files cannot hold", name=name
                )
        tensors = [Tensor(held.name, engine._plan.compute, held.shape) for held in self.held.values()]
        tensors += [Tensor(name, buffer.dtype, tuple(buffer.shape)) for name, buffer in self.buffers.items()]
        shards = cut_into_files(whole(tensors), cutting.FILE_BYTES, pieces=False)
        count = len(shards)
        self.shards = {
            f"{stem}{SUFFIX}" if count == 1 else f"{stem}-{number:05}-of-{count:05}{SUFFIX}": cuts
            for number, cuts in enumerate(shards, 1)
        }

    @property
    def index(self) -> str:
        """Name of the index."""
        return f"{self.stem}{SUFFIX}.index.json"

    def write(self, directory: Path) -> Path:
        """Writes everything aside, then renames. Raises OSError."""
        aside = {name: directory / f"{ASIDE}{name}" for name in (*self.shards, self.index)}
        single = len(self.shards) == 1
        final = directory / (next(iter(self.shards)) if single else self.index)
        try:
            for path in aside.values():
                path.unlink(missing_ok=True)  # a killed export's
            for name, cuts in self.shards.items():
                self._write_shard(aside[name], cuts)
            if not single:
                _write_text(aside[self.index], self._index_text())
            sync_directory(directory)
            if not single:
                # Readers prefer a single file to an index, and an index must not name shards of two exports.
                for old in (directory / f"{self.stem}{SUFFIX}", directory / self.index):
                    old.unlink(missing_ok=True)
                sync_directory(directory)
            for name in self.shards:
                os.rename(aside[name], directory / name)
            if not single:
                sync_directory(directory)
                os.rename(aside[self.index], directory / self.index)
            self._remove_old(directory, single)
            sync_directory(directory)
        finally:
            for path in aside.values():
                path.unlink(missing_ok=True)
        return final

    def _write_shard(self, path: Path, cuts: list[Cut]) -> None:
        with StreamWriter(path, [cut.entry for cut in cuts], {"format": "pt"}) as writer:
            for cut in cuts:
                tensor = cut.tensor
                held = self.held.get(tensor.name)
                if held is None:
                    writer.write(self.buffers[tensor.name].detach().contiguous())
                    continue
                for values in self.live.chunks(held, "weights", 0, held.numel, tensor.dtype):
                    writer.write(values)
            writer.finish()

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


def _write_text(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, memoryview(text.encode()))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

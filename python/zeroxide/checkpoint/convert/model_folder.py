"""A folder of safetensors as Hugging Face lays them out: one file or numbered ones with an index, made aside.

The files are made with their headers and their full length, so that whoever holds some elements may write them where
they belong, in any order and from any process. While the files of an earlier model are being replaced the folder has
no index, so a kill in between leaves a folder that does not load, never a mixture.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from zeroxide.checkpoint.format import cutting
from zeroxide.checkpoint.format.commit import make_directory, sync_directory, write_new
from zeroxide.checkpoint.format.cutting import Tensor, cut_into_files, whole
from zeroxide.checkpoint.format.stream import PACKED, bytes_of, dtype_name, header, write_all
from zeroxide.errors import ConfigError, ModelError

__all__ = ["DEFAULT_NAME", "ModelFile", "ModelFolder", "check_exportable", "check_name"]

DEFAULT_NAME = "model.safetensors"
SUFFIX = ".safetensors"
ASIDE = ".writing-"
METADATA = {"format": "pt"}


def check_name(name: str) -> str:
    """The stem of a file name for a model. Raises ConfigError unless it is one name that ends in .safetensors."""
    if not name.endswith(SUFFIX) or Path(name).name != name or name.startswith("."):
        raise ConfigError(
            f"save_filename {name!r}: expected one file name that ends in {SUFFIX}, or in .bin, .pt or .pth for a "
            "file of torch.save",
            path="save_filename",
            got=name,
        )
    return name.removesuffix(SUFFIX)


def check_exportable(tensors: Sequence[Tensor]) -> None:
    """Raises ModelError for a tensor of a dtype that the format lacks."""
    for tensor in tensors:
        if dtype_name(tensor.dtype) is None or (tensor.dtype in PACKED and not tensor.shape):
            kind = "is a scalar of" if tensor.dtype in PACKED else "has"
            raise ModelError(
                f"{tensor.name} {kind} dtype {tensor.dtype}, which safetensors files cannot hold; a checkpoint can "
                "(save_checkpoint)",
                name=tensor.name,
            )


class ModelFile:
    """One of the files while it is written. Tensors are addressed by name, elements by their flat index."""

    def __init__(self, descriptor: int, places: dict[str, int]) -> None:
        self._descriptor = descriptor
        self._places = places

    def write(self, tensor: Tensor, start: int, values: torch.Tensor) -> None:
        """Elements `start ..` of a tensor: contiguous, in host memory, of its dtype. Raises OSError."""
        assert values.dtype == tensor.dtype, f"{tensor.name} takes {tensor.dtype}"
        data = bytes_of(values)
        at = self._places[tensor.name] + start * tensor.dtype.itemsize
        while data.nbytes:
            count = os.pwrite(self._descriptor, data, at)
            data, at = data[count:], at + count


class ModelFolder:
    """The files of one model, described; `make`, `opened` for each of `files`, `publish`, and in any case `clean`.

    All raise OSError.
    """

    def __init__(self, directory: Path, stem: str, tensors: Sequence[Tensor]) -> None:
        self.directory = directory
        self.stem = stem
        shards = cut_into_files(whole(tensors), cutting.FILE_BYTES, pieces=False)
        count = len(shards)
        self.files: dict[str, list[Tensor]] = {
            f"{stem}{SUFFIX}" if count == 1 else f"{stem}-{number:05}-of-{count:05}{SUFFIX}": [
                cut.tensor for cut in cuts
            ]
            for number, cuts in enumerate(shards, 1)
        }
        self._aside = {name: directory / f"{ASIDE}{name}" for name in (*self.files, self.index)}

    @property
    def index(self) -> str:
        """Name of the index."""
        return f"{self.stem}{SUFFIX}.index.json"

    @property
    def to_load(self) -> Path:
        """The file that readers are given: the only one, or the index."""
        return self.directory / (next(iter(self.files)) if len(self.files) == 1 else self.index)

    def _header(self, name: str) -> bytes:
        return header([cut.entry for cut in whole(self.files[name])], METADATA)

    def make(self) -> None:
        """Makes the files aside, each with its header and as long as it will be."""
        make_directory(self.directory)
        for path in self._aside.values():
            path.unlink(missing_ok=True)  # of one that was killed
        for name, tensors in self.files.items():
            start = self._header(name)
            descriptor = os.open(self._aside[name], os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                write_all(descriptor, memoryview(start))
                # A full disk is found now rather than in the middle.
                _reserve(descriptor, len(start) + sum(each.numel * each.dtype.itemsize for each in tensors))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    @contextmanager
    def opened(self, name: str) -> Iterator[ModelFile]:
        """One of the files, to write elements into; durable at the end."""
        places = {}
        at = len(self._header(name))
        for tensor in self.files[name]:
            places[tensor.name] = at
            at += tensor.numel * tensor.dtype.itemsize
        descriptor = os.open(self._aside[name], os.O_WRONLY | os.O_CLOEXEC)
        try:
            yield ModelFile(descriptor, places)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def publish(self) -> None:
        """Gives the files their names, and removes what an earlier model had more."""
        single, directory = len(self.files) == 1, self.directory
        if not single:
            write_new(self._aside[self.index], self._index_text())
        sync_directory(directory)
        if not single:
            # Readers prefer a single file to an index, and an index must not name shards of two exports.
            for old in (directory / f"{self.stem}{SUFFIX}", directory / self.index):
                old.unlink(missing_ok=True)
            sync_directory(directory)
        for name in self.files:
            os.rename(self._aside[name], directory / name)
        if not single:
            sync_directory(directory)
            os.rename(self._aside[self.index], directory / self.index)
        self._remove_old(directory, single)
        sync_directory(directory)

    def clean(self) -> None:
        """Removes what is still aside."""
        for path in self._aside.values():
            # On a disk that fails, the first failure is the one to report.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _index_text(self) -> str:
        tensors = [each for tensors in self.files.values() for each in tensors]
        total = sum(each.numel * each.dtype.itemsize for each in tensors)
        places = {each.name: name for name, tensors in self.files.items() for each in tensors}
        return (
            json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"
        )

    def _remove_old(self, directory: Path, single: bool) -> None:
        """Removes shards of earlier exports under the same name, and files that killed ones left."""
        shard = re.compile(f"({re.escape(ASIDE)})?" + re.escape(self.stem) + r"-\d{5}-of-\d{5}" + re.escape(SUFFIX))
        for path in directory.iterdir():
            old = shard.fullmatch(path.name) and path.name not in self.files
            if old or (single and path.name == self.index):
                path.unlink(missing_ok=True)


def _reserve(descriptor: int, length: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, length)

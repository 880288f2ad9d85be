"""A state dict as torch pickles it, for scripts that ask for such files by name: one, or numbered ones with an index.

Whoever writes them holds the whole model. Each file is made aside, is durable, and then gets its name; while an earlier
model's are being replaced there is no index.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from zeroxide.checkpoint.agree import RankGroup, Team
from zeroxide.checkpoint.format.commit import make_directory, sync_directory, write_new
from zeroxide.errors import ConfigError, StorageError

__all__ = ["SUFFIXES", "save_pickled", "write_pickled"]

SUFFIXES = (".bin", ".pt", ".pth")
"""How the name of such a file ends."""
_ASIDE = ".writing-"


def save_pickled(
    ranks: RankGroup | None, gather: Callable[[], Mapping[str, torch.Tensor]], directory: Path, name: str
) -> Path:
    """Writes what `gather` returns on rank 0 into one file, and returns it. Every rank calls it, and calls `gather`.

    Raises ConfigError for what is not one file name, StorageError where the file cannot be written: on all ranks.
    """
    team = Team(ranks)

    def named() -> dict[str, object]:
        if Path(name).name != name or name.startswith("."):
            raise ConfigError(f"save_filename {name!r}: expected one file name", path="save_filename", got=name)
        return {"save_filename": name}

    team.same(team.together(named, directory), "export different models", directory)
    weights = gather()

    def write() -> None:
        try:
            if team.leads:
                write_pickled(weights, directory, name)
        except OSError as error:
            reason = f"{error.strerror or error}" + (f" at {error.filename}" if error.filename else "")
            line = f"the model was not written to {directory}: {reason}"
            raise StorageError(line, path=directory, errno=error.errno) from error

    team.together(write, directory)
    return directory / name


def write_pickled(
    weights: Mapping[str, torch.Tensor], directory: Path, name: str, max_file_bytes: int | None = None
) -> Path:
    """Writes `weights` into `directory`. Returns the file to load: `name`, or the index of several files.

    max_file_bytes: most bytes of tensors in a file, but for one tensor that is larger; None for one file whatever its
        size. Names of one tensor stay names of one tensor. Raises OSError; then an earlier model is as it was, or does
        not load.
    """
    files = _shards(weights, name, max_file_bytes)
    index = f"{name}.index.json"
    make_directory(directory)
    aside = {each: directory / f"{_ASIDE}{each}" for each in (*files, index)}
    for path in aside.values():
        path.unlink(missing_ok=True)  # of one that was killed
    try:
        for each, names in files.items():
            _write(aside[each], {key: weights[key] for key in names})
        if len(files) > 1:
            write_new(aside[index], _index_text(weights, files))
        sync_directory(directory)
        for old in (name, index) if len(files) > 1 else (index,):
            (directory / old).unlink(missing_ok=True)
        for each in (*files, index) if len(files) > 1 else files:
            os.rename(aside[each], directory / each)
        _remove_old(directory, name, files)
        sync_directory(directory)
    finally:
        for path in aside.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return directory / (index if len(files) > 1 else name)


def _shards(weights: Mapping[str, torch.Tensor], name: str, limit: int | None) -> dict[str, list[str]]:
    """By file its names, in order; all names of one tensor in one file."""
    shards: list[list[str]] = [[]]
    places: dict[int, list[str]] = {}
    filled = 0
    for key, tensor in weights.items():
        if id(tensor) in places:
            places[id(tensor)].append(key)
            continue
        if limit is not None and shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        filled += tensor.nbytes
        shards[-1].append(key)
        places[id(tensor)] = shards[-1]
    stem, _, suffix = name.rpartition(".")
    count = len(shards)
    if count == 1:
        return {name: shards[0]}
    return {f"{stem}-{number:05}-of-{count:05}.{suffix}": names for number, names in enumerate(shards, 1)}


def _write(path: Path, weights: dict[str, torch.Tensor]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        torch.save(weights, file)
        file.flush()
        os.fsync(file.fileno())


def _index_text(weights: Mapping[str, torch.Tensor], files: Mapping[str, list[str]]) -> str:
    total = sum({id(each): each.nbytes for each in weights.values()}.values())
    places = {key: file for file, names in files.items() for key in names}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"


def _remove_old(directory: Path, name: str, files: Mapping[str, list[str]]) -> None:
    stem, _, suffix = name.rpartition(".")
    shard = re.compile(f"({re.escape(_ASIDE)})?{re.escape(stem)}-\\d{{5}}-of-\\d{{5}}\\.{re.escape(suffix)}")
    for path in directory.iterdir():
        if shard.fullmatch(path.name) and path.name not in files:
            path.unlink(missing_ok=True)

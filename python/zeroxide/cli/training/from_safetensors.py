"""Weights from the safetensors files of a model directory, read a piece at a time.

A file is read with plain positioned reads into one small buffer. Mapping it, as is usual, would leave every page that
was touched in the process's resident set: as much memory as the weights take.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from zeroxide.checkpoint.format.header import StoredTensor, read_header
from zeroxide.checkpoint.format.stream import DTYPES, read_into
from zeroxide.device.placement import of_buffer
from zeroxide.errors import ModelError, StorageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FromSafetensors"]

_PIECE_BYTES = 8 << 20
_DTYPES = {name: DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies."""

    path: Path
    stored: StoredTensor

    @property
    def dtype(self) -> torch.dtype | None:
        """Its dtype; None where it is none that weights are read from."""
        return _DTYPES.get(self.stored.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.stored.shape


class FromSafetensors:
    """A weight source over the files of a directory. `unexpected` names tensors that the model has no place for.

    Every parameter must be found, under its own name, under the name of a parameter it is tied to, or with the name of
    the base model added or removed. Raises `ModelError` where one is missing or has another shape, `StorageError`
    where a file cannot be read.
    """

    def __init__(self, model: PreTrainedModel, directory: Path) -> None:
        entries: dict[str, _Entry] = {}
        for path in _files(directory):
            entries.update(_entries(path))
        aliases = _aliases(model)
        self._found: dict[str, _Entry] = {}
        used: set[str] = set()
        missing: list[str] = []
        for names in aliases.values():
            stored = next(
                (key for name in names for key in _stored_names(name, model.base_model_prefix) if key in entries), None
            )
            if stored is None:
                missing.append(names[0])
                continue
            used.update(key for name in names for key in _stored_names(name, model.base_model_prefix))
            entry = entries[stored]
            if entry.dtype is None:
                raise ModelError(
                    f"{entry.path}: {stored} has dtype {entry.stored.dtype}: weights are read from "
                    f"{', '.join(_DTYPES)}; convert the model to one of these first",
                    name=names[0],
                )
            shape = tuple(model.get_parameter(names[0]).shape)
            if entry.shape != shape:
                raise ModelError(
                    f"{entry.path.name}: {stored} has shape {list(entry.shape)}, the model wants {list(shape)}",
                    name=names[0],
                )
            self._found.update(dict.fromkeys(names, entry))
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ModelError(
                f"{directory} lacks weights for {', '.join(missing[:3])}{more}; "
                "without any safetensors file the model is trained from scratch",
                name=missing[0],
            )
        # An integer mask or counter is no weight.
        weights = {name for name, entry in entries.items() if entry.dtype is not None}
        self.unexpected = tuple(sorted(weights - used - _ignored(model, entries)))
        self._load_buffers(model, entries)

    def fill(self, tensors: dict[str, torch.Tensor], modules: dict[str, torch.nn.Module]) -> None:
        """Fill `tensors` (full parameter name -> CPU tensor) in place. `modules` are not needed here."""
        del modules
        for name, tensor in tensors.items():
            _read_into(self._found[name], tensor)

    def pieces(self, name: str, shape: torch.Size) -> Iterator[tuple[int, torch.Tensor]]:
        """The parameter's values in pieces of at most 8 MiB of the file: (first element, flat fp32 CPU tensor)."""
        entry = self._found[name]
        if entry.shape != tuple(shape):
            raise ModelError(f"{entry.path}: expected shape {list(entry.shape)}, got a parameter of {list(shape)}")
        for first, values in _read(entry):
            yield first, values.to(torch.float32)

    def _load_buffers(self, model: PreTrainedModel, entries: dict[str, _Entry]) -> None:
        persistent = model.state_dict(keep_vars=True)
        for name, buffer in model.named_buffers():
            stored = next((key for key in _stored_names(name, model.base_model_prefix) if key in entries), None)
            if stored is None or entries[stored].dtype is None:
                continue
            if name in persistent and entries[stored].shape == tuple(buffer.shape):
                _read_into(entries[stored], buffer)


def _files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        single = directory / "model.safetensors"
        return [single] if single.exists() else sorted(directory.glob("*.safetensors"))
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in table.values()})
    except OSError as error:
        raise StorageError(f"cannot read {index}: {error.strerror}", path=index, errno=error.errno) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index} is damaged: it names no files") from None
    for name in names:
        if os.path.basename(name) != name:
            raise ModelError(f"{index} names a file outside the model directory: {name}")
        if not (directory / name).is_file():
            raise ModelError(f"{index} names {name}, which is missing")
    return [directory / name for name in names]


def _entries(path: Path) -> dict[str, _Entry]:
    try:
        with path.open("rb") as file:
            found = read_header(file.fileno())
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", path=path, errno=error.errno) from None
    except ValueError as error:
        raise ModelError(f"{path} is not a safetensors file, or it is damaged: {error}") from None
    return {name: _Entry(path, each) for name, each in found.items()}


def _aliases(model: torch.nn.Module) -> dict[int, list[str]]:
    """Group the names of parameters by the parameter they stand for, tied ones together."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return groups


def _stored_names(name: str, prefix: str) -> tuple[str, ...]:
    """Return the names under which a checkpoint of the model or of its base model may hold `name`."""
    if prefix and name.startswith(prefix + "."):
        return name, name[len(prefix) + 1 :]
    return (name, f"{prefix}.{name}") if prefix else (name,)


def _ignored(model: PreTrainedModel, entries: dict[str, _Entry]) -> set[str]:
    """Return the stored tensors that the model's class declares obsolete, and those that are its buffers."""
    import re

    patterns = [re.compile(pattern) for pattern in (model._keys_to_ignore_on_load_unexpected or ())]
    buffers = {key for name, _ in model.named_buffers() for key in _stored_names(name, model.base_model_prefix)}
    return {name for name in entries if name in buffers or any(pattern.search(name) for pattern in patterns)}


def _read_into(entry: _Entry, tensor: torch.Tensor) -> None:
    if tuple(tensor.shape) != entry.shape:
        raise ModelError(f"{entry.path}: expected shape {list(entry.shape)}, got a tensor of {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ModelError(f"{entry.path}: the tensor to fill is not contiguous")
    flat = tensor.detach().view(-1)
    for first, values in _read(entry):
        flat[first : first + values.numel()].copy_(values)


def _read(entry: _Entry) -> Iterator[tuple[int, torch.Tensor]]:
    """The tensor in pieces, (first element, its values in the stored dtype), each in the memory of the one before."""
    dtype = _DTYPES[entry.stored.dtype]
    step = _PIECE_BYTES // dtype.itemsize
    numel = (entry.stored.end - entry.stored.begin) // dtype.itemsize
    buffer = bytearray(min(_PIECE_BYTES, entry.stored.end - entry.stored.begin))
    try:
        with entry.path.open("rb", buffering=0) as file:
            for first in range(0, numel, step):
                count = min(step, numel - first)
                view = memoryview(buffer)[: count * dtype.itemsize]
                position = entry.stored.begin + first * dtype.itemsize
                read = read_into(file.fileno(), view, position)
                if read < len(view):
                    raise StorageError(f"{entry.path} ends at byte {position + read}", path=entry.path)
                yield first, of_buffer(buffer, dtype, 0, count)
    except OSError as error:
        raise StorageError(f"cannot read {entry.path}: {error.strerror}", path=entry.path, errno=error.errno) from None

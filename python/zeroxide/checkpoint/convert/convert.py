"""Converting checkpoints without an engine: DeepSpeed's into zeroxide's, and either into a model folder.

Everything passes through in chunks, so memory stays small whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from zeroxide import _core
from zeroxide.checkpoint.contents import WEIGHTS
from zeroxide.checkpoint.convert.deepspeed import is_deepspeed, read_deepspeed
from zeroxide.checkpoint.convert.model_folder import DEFAULT_NAME, ModelFolder, check_exportable, check_name
from zeroxide.checkpoint.convert.portable import Portable, PortableParameter, read_own
from zeroxide.checkpoint.convert.universal import LATEST, is_universal, read_universal, write_universal
from zeroxide.checkpoint.format import commit, cutting
from zeroxide.checkpoint.format.cutting import Cut, Tensor, cut_into_files, whole
from zeroxide.checkpoint.format.json_codec import encode
from zeroxide.checkpoint.format.manifest import (
    MANIFEST,
    Counters,
    Group,
    Manifest,
    Piece,
    SavedBuffer,
    SavedFile,
    SavedParameter,
    SavedScheduler,
)
from zeroxide.checkpoint.format.stream import StreamWriter, saved_name
from zeroxide.checkpoint.live_state import CHUNK_ELEMENTS
from zeroxide.device.placement import HOST
from zeroxide.errors import CheckpointError, ConfigError, StorageError
from zeroxide.precision.bits import ORDINARY, bytes_of, converted, copy_of, why_not_bytes

__all__ = ["TARGETS", "convert", "read_weights"]

MODELS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtypes of floating-point weights that a model folder can have."""
TARGETS = ("checkpoint", "universal", *MODELS)
"""What can be made: a checkpoint of zeroxide, a universal one of DeepSpeed, or a model folder."""


def convert(
    source: Path, target: Path, to: str | None, tag: str | None, *, include_frozen: bool
) -> tuple[Path, list[str]]:
    """Converts the checkpoint `tag` in `source` (or at it; the newest if the tag is None) into `target`.

    `to` is one of TARGETS; None makes a checkpoint from DeepSpeed's and an fp32 model from zeroxide's. Returns what
    was written, and lines about what was left out. Raises ConfigError for another `to`, CheckpointError where the
    source cannot be read, StorageError or CheckpointError where the target cannot be written.
    """
    if to is not None and to not in TARGETS:
        raise ConfigError(f"--to {to}: expected one of {', '.join(TARGETS)}", path="to", got=to)
    directory, form = _locate(source, tag)
    kind = to or ("fp32" if form == "checkpoint" else "checkpoint")
    if kind == form:
        whose = "zeroxide" if form == "checkpoint" else "that form"
        others = ", ".join(each for each in TARGETS if each != kind)
        raise ConfigError(f"{directory} is a checkpoint of {whose} already: give --to {others}", path="to")
    found = _read(directory, form, moments=kind in ("checkpoint", "universal"))
    try:
        if kind == "checkpoint":
            return _write_checkpoint(found, target, directory.name, include_frozen), list(found.notes)
        if kind == "universal":
            return write_universal(found, target, directory.name, include_frozen), list(found.notes)
        return _write_model(found, target, MODELS[kind], include_frozen), list(found.notes)
    except OSError as error:
        reason = f"{error.strerror or error}" + (f" at {error.filename}" if error.filename else "")
        raise StorageError(f"nothing was written to {target}: {reason}", path=target, errno=error.errno) from error


def read_weights(source: Path, tag: str | None, dtype: torch.dtype, *, include_frozen: bool) -> dict[str, torch.Tensor]:
    """Weights and buffers of a checkpoint by name, where `convert` finds it, whole in host memory.

    Weights have `dtype` but for those whose elements are no ordinary numbers; all names of a tied one have one tensor.
    Raises CheckpointError.
    """
    found = _read(*_locate(source, tag), moments=False)
    weights: dict[str, torch.Tensor] = {}
    for each in found.parameters:
        if not (each.trainable or include_frozen):
            continue
        numel = torch.Size(each.shape).numel()
        if numel and (each.name, WEIGHTS) not in found.segments:
            raise CheckpointError(
                f"the weights of {each.name} are not in the checkpoint, as it was saved without frozen parameters"
            )
        whole_one = torch.empty(numel, dtype=_model_dtype(found, each, dtype), device=HOST)
        at = 0
        for values in _range(found, WEIGHTS, Cut(_tensor(found, each, dtype), 0, numel)) if numel else ():
            whole_one[at : at + values.numel()] = converted(values, whole_one.dtype)
            at += values.numel()
        weights.update(dict.fromkeys(each.names, whole_one.view(each.shape)))
    return weights | dict(found.buffers)


def _tensor(found: Portable, param: PortableParameter, dtype: torch.dtype) -> Tensor:
    """A weight as it is in what is made of the checkpoint."""
    return Tensor(param.name, _model_dtype(found, param, dtype), tuple(param.shape))


def _locate(source: Path, tag: str | None) -> tuple[Path, str]:
    """The directory of the checkpoint, and its form: "checkpoint" for zeroxide's, "zero" or "universal"."""
    if tag is None and (is_universal(source) or is_deepspeed(source)):
        return source, _form(source)
    if tag is None and (source / MANIFEST).is_file():
        return source, "checkpoint"
    if tag is None and not (source / "latest").is_file() and (source / LATEST).is_file():
        tag = (source / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    found = commit.find(source, tag)
    return found, _form(found)


def _form(directory: Path) -> str:
    if (directory / MANIFEST).exists():
        return "checkpoint"
    return "universal" if is_universal(directory) else "zero" if is_deepspeed(directory) else "checkpoint"


def _read(directory: Path, form: str, *, moments: bool) -> Portable:
    """The checkpoint there. Without `moments`, but of ZeRO's, the weights and buffers alone."""
    if form == "universal":
        return read_universal(directory, moments=moments)
    return read_deepspeed(directory) if form == "zero" else read_own(directory, moments=moments)


# A checkpoint --------------------------------------------------------------------------------------------------------


def _write_checkpoint(found: Portable, save_dir: Path, tag: str, include_frozen: bool) -> Path:
    commit.check_tag(tag, save_dir)
    frame = _Frame(found)
    commit.prepare(save_dir, tag)
    aside = commit.Aside(save_dir, tag)
    try:
        files, pieces = _write_files(found, aside.path, include_frozen)
        complete = frame.manifest(files, pieces)
        complete.check()
        aside.commit(complete.text(), latest=True)
    finally:
        aside.close()
    return save_dir / tag


Pieces = dict[tuple[str, str], list[Piece]]


def _write_files(found: Portable, directory: Path, include_frozen: bool) -> tuple[list[SavedFile], Pieces]:
    kept = [each for each in found.parameters if each.trainable or include_frozen]
    families = {
        part: [
            Tensor(each.name, found.dtype(each.name, part), tuple(each.shape))
            for each in kept
            if (each.name, part) in found.segments
        ]
        for part in (WEIGHTS, *_states(found))
    }
    families["buffers"] = [Tensor(name, each.dtype, tuple(each.shape)) for name, each in found.buffers.items()]
    files, pieces = [], Pieces()
    for family, tensors in families.items():
        for number, cuts in enumerate(cut_into_files(whole(tensors), cutting.FILE_BYTES, pieces=True), 1):
            name = f"{family}-{number:05}.safetensors"
            with StreamWriter(directory / name, [cut.entry for cut in cuts], {}) as writer:
                for cut in cuts:
                    for values in _range(found, family, cut):
                        writer.write(values)
                checksum = writer.finish()
            files.append(SavedFile(name=name, bytes=writer.bytes, crc64nvme=checksum))
            for cut in cuts:
                dtype = saved_name(cut.tensor.dtype)
                pieces.setdefault((family, cut.tensor.name), []).append(
                    Piece(file=name, key=cut.entry.key, start=cut.start, count=cut.count, dtype=dtype)
                )
    return files, pieces


def _states(found: Portable) -> list[str]:
    """The names of the state tensors that any parameter has, in their order."""
    return list(dict.fromkeys(part for _, part in found.segments if part != WEIGHTS))


def _range(found: Portable, family: str, cut: Cut) -> Iterator[torch.Tensor]:
    """The elements of a cut, in chunks."""
    name = cut.tensor.name
    at, end = 0, cut.start + cut.count
    for segment in [_flat(found.buffers[name])] if family == "buffers" else found.segments[name, family]:
        low, high = max(cut.start - at, 0), min(end - at, segment.numel())
        for start in range(low, high, CHUNK_ELEMENTS):
            chunk = segment[start : min(start + CHUNK_ELEMENTS, high)]
            # Zeros may be one element seen many times.
            yield chunk if chunk.stride(0) == 1 else copy_of(chunk)
        at += segment.numel()


def _flat(buffer: torch.Tensor) -> torch.Tensor:
    return bytes_of(buffer).view(buffer.dtype)


class _Frame:
    """Everything but the tensors, checked before anything is written."""

    def __init__(self, found: Portable) -> None:
        self._found = found
        kind, state = found.scheduler or ("", None)
        for name, buffer in found.buffers.items():
            problem = why_not_bytes(buffer)
            if problem is not None:
                raise CheckpointError(f"buffer {name} {problem}, which no file of a checkpoint can hold")
        self._frame = {
            "zeroxide": _core.__version__,
            "precision": found.precision,
            "state_format": "fp32",
            "counters": Counters(**found.counters),
            "groups": [
                Group(hyperparameters=encode(dict(group), f"optimizer group {number}"))
                for number, group in enumerate(found.groups)
            ],
            "scheduler": SavedScheduler(kind=kind, state=encode(state, f"the state of {kind}")) if kind else None,
            "loss_scale": None,
            "generators": [],
            "client_state": encode(dict(found.client_state), "client_state"),
        }

    def manifest(self, files: list[SavedFile], pieces: Pieces) -> Manifest:
        """The whole of it."""
        states = _states(self._found)
        return Manifest(
            **self._frame,
            parameters=[
                SavedParameter(
                    names=each.names,
                    shape=each.shape,
                    trainable=each.trainable,
                    opaque=each.opaque,
                    updates=each.updates,
                    group=each.group,
                    weights=pieces.get((WEIGHTS, each.name), []),
                    state={name: own for name in states if (own := pieces.get((name, each.name)))},
                )
                for each in self._found.parameters
            ],
            buffers=[
                SavedBuffer(name=name, shape=list(each.shape), pieces=pieces["buffers", name])
                for name, each in self._found.buffers.items()
            ],
            files=files,
        )


# A model folder ------------------------------------------------------------------------------------------------------


def _write_model(found: Portable, directory: Path, dtype: torch.dtype, include_frozen: bool) -> Path:
    missing = [
        each.name
        for each in found.parameters
        if (each.name, "weights") not in found.segments and torch.Size(each.shape).numel()
    ]
    if missing and include_frozen:
        raise CheckpointError(
            f"the weights of {missing[0]} are not in the checkpoint, as it was saved without frozen parameters: give "
            "--exclude-frozen"
        )
    tensors = [
        _tensor(found, each, dtype)
        for each in found.parameters
        if (each.trainable or include_frozen) and each.name not in missing
    ]
    for name, buffer in found.buffers.items():
        problem = why_not_bytes(buffer)
        if problem is not None:
            raise CheckpointError(f"buffer {name} {problem}, which safetensors files cannot hold")
    tensors += [Tensor(name, each.dtype, tuple(each.shape)) for name, each in found.buffers.items()]
    check_exportable(tensors)
    folder = ModelFolder(directory, check_name(DEFAULT_NAME), tensors)
    try:
        folder.make()
        for name, members in folder.files.items():
            with folder.opened(name) as file:
                for tensor in members:
                    if tensor.name in found.buffers:
                        file.write(tensor, 0, _flat(found.buffers[tensor.name]))
                        continue
                    at = 0
                    for values in _range(found, "weights", Cut(tensor, 0, tensor.numel)) if tensor.numel else ():
                        file.write(tensor, at, converted(values, tensor.dtype))
                        at += values.numel()
        folder.publish()
    finally:
        folder.clean()
    return folder.to_load


def _model_dtype(found: Portable, param: PortableParameter, dtype: torch.dtype) -> torch.dtype:
    """What a weight has in the folder: the dtype asked for, or its own where its elements are no ordinary numbers."""
    if (param.name, "weights") not in found.segments:
        return dtype
    stored = found.dtype(param.name, "weights")
    return stored if param.opaque or stored not in ORDINARY else dtype

"""`deepspeed.utils.zero_to_fp32`: whole weights in fp32 out of a checkpoint, zeroxide's or DeepSpeed's."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zeroxide.checkpoint.convert.convert import convert, read_weights
from zeroxide.checkpoint.convert.pickled import write_pickled
from zeroxide.checkpoint.format.json_codec import decode
from zeroxide.checkpoint.format.manifest import MANIFEST, read_manifest
from zeroxide.config.sizes import parse_bytes
from zeroxide.device.placement import HOST
from zeroxide.errors import CheckpointError, ConfigError, StorageError

__all__ = [
    "convert_zero_checkpoint_to_fp32_state_dict",
    "get_fp32_state_dict_from_zero_checkpoint",
    "get_model_state_file",
    "get_optim_files",
    "load_state_dict_from_zero_checkpoint",
]


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | Path,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, torch.Tensor]:
    """Weights in fp32, and buffers, by name; tied weights have one tensor. The model is in host memory once.

    checkpoint_dir: what was given to `save_checkpoint`. tag: the newest if None. Raises CheckpointError, and
    ConfigError for `lazy_mode`, which is not built.
    """
    if lazy_mode:
        raise ConfigError(
            "lazy_mode is not built: convert_zero_checkpoint_to_fp32_state_dict writes a model folder in little memory",
            path="lazy_mode",
        )
    return read_weights(Path(checkpoint_dir), tag, torch.float32, include_frozen=not exclude_frozen_parameters)


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    max_shard_size: Any = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Writes weights in fp32 into the folder `output_dir`, as Hugging Face loads them.

    max_shard_size: most bytes of a pickled file, as a number or as "5GB"; None for one file whatever its size.
    safe_serialization: whether they are safetensors, written in little memory and cut at a size of their own, and not
        pytorch_model.bin, for which this process must hold the model.

    Raises CheckpointError, StorageError, and ConfigError for a size that is none.
    """
    source, target = Path(checkpoint_dir), Path(output_dir)
    if safe_serialization:
        convert(source, target, "fp32", tag, include_frozen=not exclude_frozen_parameters)
        return
    try:
        limit = None if max_shard_size is None else parse_bytes(max_shard_size)
    except ValueError as error:
        raise ConfigError(f"max_shard_size {max_shard_size!r}: expected {error}", path="max_shard_size") from None
    weights = read_weights(source, tag, torch.float32, include_frozen=not exclude_frozen_parameters)
    try:
        write_pickled(weights, target, "pytorch_model.bin", limit)
    except OSError as error:
        reason = f"{error.strerror or error}" + (f" at {error.filename}" if error.filename else "")
        raise StorageError(f"nothing was written to {target}: {reason}", path=target, errno=error.errno) from error


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | Path, tag: str | None = None
) -> nn.Module:
    """The model in host memory, with the weights of the checkpoint. Raises CheckpointError, and what torch raises for
    weights that do not fit."""
    model = model.to(HOST)
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag))
    return model


def get_optim_files(checkpoint_dir: str | Path) -> list[str]:
    """Files of optimizer state in `checkpoint_dir`, which is a tag's. Lightning asks the first for the stage.

    Of zeroxide's checkpoints, which have no pickles and know no stage, a temporary file that says 2: their parts are
    put together whatever it is. Raises CheckpointError where there is neither.
    """
    folder = Path(checkpoint_dir)
    if not (folder / MANIFEST).is_file():
        return _deepspeed_files(folder, "*_optim_states.pt")
    return [_written(folder, "optim_states.pt", {"optimizer_state_dict": {"zero_stage": 2}})]


def get_model_state_file(checkpoint_dir: str | Path, zero_stage: int) -> str:
    """The file in `checkpoint_dir`, which is a tag's, that has what was given to `save_checkpoint` as `client_state`.

    Of zeroxide's checkpoints a temporary file with that alone: `get_fp32_state_dict_from_zero_checkpoint` has the
    weights. Raises CheckpointError where there is neither.
    """
    folder = Path(checkpoint_dir)
    if not (folder / MANIFEST).is_file():
        return _deepspeed_files(folder, "*mp_rank_00_model_states.pt")[0]
    return _written(folder, "model_states.pt", decode(read_manifest(folder).client_state))


def _deepspeed_files(folder: Path, pattern: str) -> list[str]:
    found = sorted(map(str, folder.glob(pattern)))
    if not found:
        raise CheckpointError(f"{folder} has no {pattern} and no {MANIFEST}: it is no checkpoint's", path=folder)
    return found


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    # Removed when the process ends.
    return tempfile.TemporaryDirectory(prefix="zeroxide-")


def _written(folder: Path, name: str, content: dict[str, Any]) -> str:
    place = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=_temporary().name)) / name
    torch.save(content, place)
    return str(place)

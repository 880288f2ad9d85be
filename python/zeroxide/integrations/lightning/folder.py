"""Checkpoints as Lightning has them: a folder with the engine's own, and beside that what else Lightning saves.

The engine's checkpoint names the file beside it, which is written first and under a new name: a save that is killed at
any instant leaves the pair of before, or the new one.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zeroxide.checkpoint.convert.convert import read_weights
from zeroxide.checkpoint.format.manifest import read_manifest
from zeroxide.engine.engine import Engine
from zeroxide.errors import CheckpointError
from zeroxide.rows import rows_of
from zeroxide.zero.access.safe import safe_get_full_fp32_param
from zeroxide.zero.names import plain_name

__all__ = ["TAG", "exact_state_dict", "load_folder", "load_weights", "save_folder"]

TAG = "checkpoint"
"""The engine's checkpoint in the folder, under the name that Lightning has for DeepSpeed's."""
_BESIDE = "lightning-*.pt"
_KEY = "lightning"


def save_folder(engine: Engine, folder: Path, rest: dict[str, Any], broadcast: Callable[[Any], Any]) -> None:
    """Saves the engine, and `rest`, which is rank 0's, by `torch.save`. Every rank calls it."""
    name = broadcast(f"lightning-{secrets.token_hex(8)}.pt")
    leads = engine.global_rank == 0
    if leads:
        if folder.is_file() or folder.is_symlink():
            folder.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(rest, folder / name)
    older = broadcast([each.name for each in folder.glob(_BESIDE) if each.name != name])
    # Lightning saves whenever somebody asks, and begins a window anew when it resumes.
    engine.save_checkpoint(folder, TAG, client_state={_KEY: name}, leave_out_gradients=True)
    if older:
        # The one before is needed until the new one is there.
        engine.wait_for_checkpoint()
        for each in older if leads else ():
            (folder / each).unlink(missing_ok=True)


def load_folder(
    engine: Engine, folder: Path, read: Callable[[Path], dict[str, Any]], *, strict: bool, resume: bool
) -> dict[str, Any]:
    """Loads what `save_folder` saved into an engine that trains, at any number of ranks; weights alone unless `resume`.

    read: reads the file beside the engine's checkpoint. Returns what that has. Raises CheckpointError.
    """
    _, state = engine.load_checkpoint(
        folder,
        TAG,
        load_module_strict=strict,
        load_optimizer_states=resume,
        load_lr_scheduler_states=False,
        load_module_only=not resume,
    )
    return _beside(folder, state or {}, read)


def load_weights(
    engine: Engine, folder: Path, read: Callable[[Path], dict[str, Any]], *, strict: bool
) -> dict[str, Any]:
    """Loads weights into an engine that only evaluates. Rank 0 has the whole model in memory meanwhile."""
    weights = read_weights(folder, TAG, torch.float32, include_frozen=True) if engine.global_rank == 0 else {}
    engine.load_module_state_dict(weights, strict=strict)
    state = read_manifest(folder / TAG).client_state
    return _beside(folder, state if isinstance(state, dict) else {}, read)


def _beside(folder: Path, state: dict[str, Any], read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    name = state.get(_KEY)
    if name is None:
        raise CheckpointError(
            f"{folder} was not saved by Lightning: load it with engine.load_checkpoint, and save it again", path=folder
        )
    return read(folder / name)


def exact_state_dict(engine: Engine) -> dict[str, torch.Tensor]:
    """All weights and buffers on rank 0, trained weights in fp32 with all their bits; an empty dict elsewhere.

    Every rank calls it.
    """
    found = engine.module_state_dict()
    exact: dict[int, torch.Tensor | None] = {}
    for name, param in engine.module.named_parameters(remove_duplicate=False):
        if param.requires_grad:
            if id(param) not in exact:
                values = safe_get_full_fp32_param(param)
                exact[id(param)] = _in_its_matrix(param, values, found, name) if found else None
            if found:
                found[plain_name(name)] = exact[id(param)]  # type: ignore[assignment]
    return found


def _in_its_matrix(
    param: torch.Tensor, values: torch.Tensor | None, found: dict[str, torch.Tensor], name: str
) -> torch.Tensor | None:
    """The values of a parameter; of a block of rows, the matrix in which they are, which the first block makes."""
    rows = rows_of(param)
    if rows is None or values is None:
        return values
    full = (
        torch.empty(rows.shape, dtype=values.dtype, device=values.device)
        if rows.first == 0
        else found[plain_name(name)]
    )
    full[rows.first : rows.end] = values
    return full

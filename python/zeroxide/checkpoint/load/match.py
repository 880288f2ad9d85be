"""Whether a checkpoint belongs to an engine's model, and what of it goes where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zeroxide.checkpoint.contents import ParamRecord
from zeroxide.checkpoint.format.json_codec import decode
from zeroxide.checkpoint.format.manifest import Manifest, SavedBuffer, SavedParameter
from zeroxide.checkpoint.format.stream import SAVED
from zeroxide.errors import CheckpointError
from zeroxide.optim.rules import RULE
from zeroxide.precision.bits import FLOATS, converts
from zeroxide.zero.names import plain_name

__all__ = ["match_buffers", "match_groups", "match_parameters", "match_rules"]

SHOWN = 3


@dataclass
class _Differences:
    """What does not fit, by kind, each kind with the names concerned."""

    missing: list[str]
    unexpected: list[str]
    shapes: list[str]
    ties: list[str]
    dtypes: list[str] = field(default_factory=list)

    def lines(self, strict: bool) -> list[str]:
        kinds = [("has another shape for", self.shapes), ("has another dtype for", self.dtypes)]
        if strict:
            kinds += [("lacks", self.missing), ("also holds", self.unexpected), ("shares otherwise", self.ties)]
        return [f"it {verb} {_some(names)}" for verb, names in kinds if names]


def _some(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _refuse(kind: str, found: _Differences, strict: bool, path: Path) -> None:
    lines = found.lines(strict)
    if not lines:
        return
    advice = "" if found.shapes or found.dtypes else "; load_module_strict=False loads the names that both have"
    raise CheckpointError(
        f"{path} was saved from another model: among the {kind}, {'; '.join(lines)}{advice}", path=path
    )


def match_parameters(
    held: Sequence[ParamRecord],
    manifest: Manifest,
    path: Path,
    *,
    strict: bool,
    elsewhere: Set[str] = frozenset(),
) -> dict[str, SavedParameter | None]:
    """For every parameter of the engine, by its first name, the saved one; None where the checkpoint has none.

    A parameter is found by any of its names. `elsewhere` has names that other parts of the model have. Raises
    CheckpointError where shapes differ and, if `strict`, where names or the sharing of parameters do.
    """
    by_name = {plain_name(name): saved for saved in manifest.parameters for name in saved.names}
    result: dict[str, SavedParameter | None] = {}
    found = _Differences([], [], [], [])
    users: dict[str, str] = {}
    for one in held:
        candidates = {saved.name: saved for name in one.names if (saved := by_name.get(name))}
        saved = next(iter(candidates.values()), None)
        result[one.name] = saved
        if saved is None:
            found.missing.append(one.name)
            continue
        if list(one.full_shape) != saved.shape:
            found.shapes.append(f"{one.name} ({_shape(saved.shape)} there, {_shape(one.full_shape)} here)")
        stored = SAVED[saved.weights[0].dtype] if saved.weights else one.dtype
        opaque = one.opaque or saved.opaque
        if stored != one.dtype and (opaque or not converts(stored, one.dtype)):
            found.dtypes.append(f"{one.name} ({_dtype(stored)} there, {_dtype(one.dtype)} here)")
        if len(candidates) > 1:
            found.ties.append(f"{one.name} ({len(candidates)} parameters there, one here)")
        if users.get(saved.name, one.name) != one.name:
            found.ties.append(f"{one.name} (one parameter with {users[saved.name]} there, two here)")
        users[saved.name] = one.name
    known = {name for one in held for name in one.names} | elsewhere
    found.unexpected = [
        saved.name for saved in manifest.parameters if known.isdisjoint(plain_name(name) for name in saved.names)
    ]
    # Blocks of rows of one parameter say the same.
    found.missing, found.shapes = list(dict.fromkeys(found.missing)), list(dict.fromkeys(found.shapes))
    found.dtypes = list(dict.fromkeys(found.dtypes))
    _refuse("parameters", found, strict, path)
    return result


def match_buffers(
    buffers: dict[str, torch.Tensor],
    manifest: Manifest,
    path: Path,
    *,
    strict: bool,
    elsewhere: Set[str] = frozenset(),
) -> list[tuple[torch.Tensor, SavedBuffer]]:
    """Buffers of the model with what was saved for each. Raises CheckpointError like `match_parameters`."""
    by_name = {plain_name(saved.name): saved for saved in manifest.buffers}
    found = _Differences([name for name in buffers if name not in by_name], [], [], [])
    found.unexpected = [name for name in by_name if name not in buffers and name not in elsewhere]
    pairs = []
    for name, buffer in buffers.items():
        saved = by_name.get(name)
        if saved is None:
            continue
        stored = SAVED[saved.pieces[0].dtype]
        fits = buffer.dtype == stored or (buffer.dtype in FLOATS and stored in FLOATS)
        if list(buffer.shape) != saved.shape or not fits:
            found.shapes.append(
                f"{name} ({stored} {_shape(saved.shape)} there, {buffer.dtype} {_shape(buffer.shape)} here)"
            )
        pairs.append((buffer, saved))
    _refuse("buffers", found, strict, path)
    return pairs


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape) or "scalar"


def match_groups(
    held: Sequence[ParamRecord], saved: dict[str, SavedParameter | None], groups: int, manifest: Manifest, path: Path
) -> None:
    """Raises CheckpointError unless every parameter is in the optimizer group, by number, that it was in."""
    if groups != len(manifest.groups):
        raise CheckpointError(
            f"{path} was saved with {len(manifest.groups)} optimizer groups, this engine has {groups}: pass the same "
            "groups, or load_optimizer_states=False and load_lr_scheduler_states=False",
            path=path,
        )
    moved = [
        f"{one.name} (group {was.group} there, {one.group} here)"
        for one in held
        if (was := saved[one.name]) is not None and None not in (was.group, one.group) and was.group != one.group
    ]
    if moved:
        raise CheckpointError(
            f"{path} was saved with other optimizer groups: {_some(moved)}; pass the same groups, or "
            "load_optimizer_states=False and load_lr_scheduler_states=False",
            path=path,
        )


def match_rules(groups: Sequence[Mapping[str, Any]], manifest: Manifest, path: Path) -> None:
    """Raises CheckpointError unless every optimizer group has the rule whose state was saved.

    Checkpoints that name none were saved by Adam or AdamW.
    """
    for number, (mine, saved) in enumerate(zip(groups, manifest.groups, strict=True)):
        theirs = decode(saved.hyperparameters)
        was = theirs.get(RULE, "adam") if isinstance(theirs, dict) else "adam"
        if was != mine[RULE]:
            raise CheckpointError(
                f"{path} was saved with the optimizer {was} in group {number}, this engine has {mine[RULE]}: use the "
                "same, or pass load_optimizer_states=False to start its state anew",
                path=path,
            )

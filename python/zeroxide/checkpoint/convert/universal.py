"""DeepSpeed's universal checkpoints: one file for each part of each parameter, whatever ranks and stages there were.

```
TAG/zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt    {"param": tensor}, or the tensor alone (from stage 3, flat)
TAG/zero/NAME/step.pt                               updates so far
TAG/zero/optimizer_state.pt                         parameter groups and what concerns all
TAG/mp_rank_00_model_states.pt                      everything else, as in a ZeRO checkpoint
latest_universal                                    TAG
```

(deepspeed/checkpoint/ds_to_universal.py of DeepSpeed 0.19.8, and what its optimizers load: stages 1 and 2 in
runtime/base_optimizer.py, `load_hp_checkpoint_state_from_checkpoint_dir`, stage 3 in runtime/zero/stage3.py.)
"""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from zeroxide.checkpoint.contents import WEIGHTS
from zeroxide.checkpoint.convert.deepspeed import HYPERPARAMETERS, MOMENTS, Reader, load_file
from zeroxide.checkpoint.convert.portable import Portable, PortableParameter
from zeroxide.device.placement import HOST, has_values
from zeroxide.errors import CheckpointError
from zeroxide.precision.bits import ORDINARY, why_not_bytes

__all__ = ["LATEST", "is_universal", "read_universal", "write_universal"]

LATEST = "latest_universal"
"""The file beside the checkpoints that names the newest one."""

_VERSION = 0.4
"""Of the format, as DeepSpeed 0.19.8 writes it."""
_DEEPSPEED = "0.19.8"
_FILES = {"weights": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""What the file of each part is called."""


def is_universal(directory: Path) -> bool:
    """Whether the directory looks like a universal checkpoint."""
    return (directory / "zero").is_dir() and next(directory.glob("*_optim_states.pt"), None) is None


def read_universal(directory: Path, *, moments: bool) -> Portable:
    """The checkpoint in `directory`. Values are read when they are asked for, and nothing in the files is run.

    Without `moments` only weights and buffers are read, and no parameter has updates. A parameter without a file of
    either moment is one that no gradient has reached: its moments are zero, it has no updates, and a note counts it.
    Raises CheckpointError where files are missing, damaged, hold what could run, or do not fit together.
    """
    try:
        return _UniversalReader(directory, moments=moments).portable()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{directory} is not laid out as DeepSpeed's universal checkpoints are: {type(error).__name__}: {error}",
            path=directory,
        ) from error


class _UniversalReader(Reader):
    """Takes everything but the trainable parameters from the model states, as for a ZeRO checkpoint."""

    def __init__(self, directory: Path, *, moments: bool) -> None:
        self.directory = directory
        self.notes = []
        self._moments = moments
        self._zero = directory / "zero"
        shards = sorted(directory.glob("zero_pp_rank_*_mp_rank_00_model_states.pt"), key=_rank)
        whole = directory / "mp_rank_00_model_states.pt"
        if next(directory.glob("*mp_rank_01*"), None) is not None:
            raise self.wrong("it is of several model-parallel ranks")
        # What DeepSpeed converts from stage 3 has a file for each rank, with its part of frozen parameters.
        self.stage = 1 if whole.is_file() else 3
        self.models = [load_file(path) for path in ([whole] if self.stage == 1 else shards)]
        if not self.models:
            raise self.wrong("its *_model_states.pt is missing")
        self.model = self.models[0]
        state = load_file(self.there(self._zero / "optimizer_state.pt"))
        inner = state.get("optimizer_state_dict") or {}
        self._param_groups = state.get("param_groups") or inner["param_groups"]
        first = (inner.get("state") or {}).get(0) or {}
        self._step = first.get("step", self._param_groups[0].get("step"))
        self._steps: dict[int, int] = {}

    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the optimizer."""
        return list(self._param_groups)

    def updates(self, flat: int) -> int:
        """How often the parameters of a flat tensor were updated."""
        return self._steps[flat]

    def sharded(self) -> Iterator[tuple[str, Sequence[int], int, dict[str, list[torch.Tensor]]]]:
        """(name, shape, flat tensor, elements by part) of each trainable parameter."""
        shapes = self.model["param_shapes"]
        untouched: list[str] = []
        uncounted: list[str] = []
        for flat, members in enumerate([shapes] if isinstance(shapes, dict) else shapes):
            for name, shape in members.items():
                folder = self._zero / name
                if self._zero.resolve() not in folder.resolve().parents:
                    raise self.wrong(f"{name} is no name of a parameter")
                parts = {WEIGHTS: [self._part(folder, WEIGHTS, name, shape)]}
                self._steps[flat] = 0
                if self._moments and self._was_updated(folder, name):
                    step = self._step_of(folder, name)
                    self._steps[flat] = step or 0
                    uncounted += [name] if step is None else []
                    parts |= {part: [self._part(folder, part, name, shape)] for part in MOMENTS}
                elif self._moments:
                    untouched.append(name)
                    zeros = torch.zeros((), dtype=torch.float32, device=HOST).expand(prod(shape))
                    parts |= {part: [zeros] for part in MOMENTS}
                yield name, tuple(shape), flat, parts
        self._note(untouched, "no moments in the checkpoint", "moments and the count of updates begin at zero")
        self._note(uncounted, "no step in the checkpoint", "the count of updates begins at zero")

    def _note(self, names: list[str], lack: str, result: str) -> None:
        if names:
            count = "1 parameter has" if len(names) == 1 else f"{len(names)} parameters have"
            self.notes.append(f"{count} {lack} (first {names[0]}): {result}")

    def _was_updated(self, folder: Path, name: str) -> bool:
        """Whether there has to be a file of each moment: there is one of either, or a step of the parameter's own."""
        if any((folder / f"{_FILES[part]}.pt").is_file() for part in MOMENTS):
            return True
        return (folder / "step.pt").is_file() and bool(self._step_of(folder, name))

    def _step_of(self, folder: Path, name: str) -> int | None:
        """How often the parameter was updated, by its own file or else by the optimizer's; None where neither says."""
        own = folder / "step.pt"
        step, where = self._step, "the step in optimizer_state.pt"
        if own.is_file():
            step, where = load_file(own, plain=True), f"step.pt of {name}"
        elif step is None:
            return None
        if isinstance(step, torch.Tensor) and _what_else(step) is None and step.numel() == 1:
            step = step.item()
        # Some of DeepSpeed's optimizers keep it as a float. A bool is an int to Python.
        if type(step) not in (int, float) or step < 0 or step != step // 1:
            got = step if type(step) in (int, float) else type(step).__name__
            raise self.wrong(f"{where}: expected a whole number of updates, got {got}")
        return int(step)

    def _part(self, folder: Path, part: str, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The elements of one part."""
        path = folder / f"{_FILES[part]}.pt"
        if not path.is_file():
            raise self.wrong(f"{path.name} of {name} is missing")
        found = load_file(path, plain=True)
        allowed = [tuple(shape)]
        if not isinstance(found, dict):
            allowed += [(prod(shape),)] if self.stage == 3 else []
        elif found.get("is_expert_param"):
            raise self.wrong("it has experts")
        else:
            # Where DeepSpeed cuts a parameter along parts of it, such as queries, keys and values, the tensor may be
            # another view of the same elements.
            cut = found.get("sub_param_shape") is not None
            found = found["param"]
            if cut and isinstance(found, torch.Tensor) and _what_else(found) is None and found.numel() == prod(shape):
                allowed = [tuple(found.shape)]
        other = type(found).__name__ if not isinstance(found, torch.Tensor) else _what_else(found)
        if other is None and (found.dtype not in ORDINARY or tuple(found.shape) not in allowed):
            other = f"{str(found.dtype).removeprefix('torch.')} of shape {tuple(found.shape)}"
        if other is not None:
            raise self.wrong(f"{path.name} of {name}: expected fp32, bf16 or fp16 of shape {tuple(shape)}, got {other}")
        flat: torch.Tensor = found.reshape(-1)
        return flat


def _what_else(tensor: torch.Tensor) -> str | None:
    """What the tensor is instead of elements in memory; None if it is that."""
    problem = why_not_bytes(tensor)
    if problem is not None:
        return f"a tensor that {problem}"
    return None if has_values(tensor) else "a tensor without values"


def _rank(path: Path) -> int:
    return int(path.name.removeprefix("zero_pp_rank_").partition("_")[0])


def write_universal(found: Portable, target: Path, tag: str, include_frozen: bool) -> Path:
    """Writes `target`/`tag`, which DeepSpeed 0.19.8 loads at stages 1 to 3 with `"load_universal": true`.

    One parameter at a time is in memory. The directory is complete when it has its name. Raises CheckpointError where
    there is one of that name, and for state that is not Adam's.
    """
    directory = target / tag
    if directory.exists():
        raise CheckpointError(f"{directory} exists: give another directory", path=directory)
    _check(found)
    target.mkdir(parents=True, exist_ok=True)
    aside = target / f"{tag}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        for each in found.parameters:
            if each.trainable:
                _write_parameter(found, each, aside / "zero" / each.name)
        _save(_optimizer_state(found), aside / "zero" / "optimizer_state.pt")
        states = _model_states(found, include_frozen)
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
            _save(states, aside / name)
        aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    newest = target / f"{LATEST}.new"
    newest.write_text(tag, encoding="utf-8")
    newest.replace(target / LATEST)
    return directory


def _check(found: Portable) -> None:
    other = sorted({part for _, part in found.segments} - {WEIGHTS, *MOMENTS})
    rules = sorted({str(group.get("optimizer", "adam")) for group in found.groups} - {"adam"})
    if other or rules:
        what = f"state {other[0]}" if other else f"parameters of {rules[0]}"
        raise CheckpointError(f"it has {what}: universal checkpoints are written of Adam's alone")
    for each in found.parameters:
        if each.trainable and any(part in ("", ".", "..") for part in each.name.split("/")):
            raise CheckpointError(f"{each.name} is no name for a directory")


def _write_parameter(found: Portable, param: PortableParameter, folder: Path) -> None:
    for part, file in _FILES.items():
        values = _whole(found, param, part)
        # That of stages 1 and 2, which stage 3 reads as well.
        _save({"cat_dim": 0, "param": values.view(param.shape)}, folder / f"{file}.pt")
    _save(torch.tensor(float(param.updates), device=HOST), folder / "step.pt")


def _whole(found: Portable, param: PortableParameter, part: str) -> torch.Tensor:
    """A part of a parameter as fp32 in one piece."""
    values = torch.zeros(prod(param.shape), dtype=torch.float32, device=HOST)
    at = 0
    for chunk in found.segments.get((param.name, part), ()):
        values[at : at + chunk.numel()] = chunk
        at += chunk.numel()
    return values


def _optimizer_state(found: Portable) -> dict[str, Any]:
    """What concerns all parameters: at the top for stages 1 and 2, one deeper for stage 3."""
    kept = (*HYPERPARAMETERS, "bias_correction")
    groups = [
        {**{key: value for key, value in group.items() if key in kept}, "params": [number]}
        for number, group in enumerate(found.groups)
    ]
    updates = max((each.updates for each in found.parameters), default=0)
    return {
        "ds_version": _DEEPSPEED,
        "overflow": False,
        "param_groups": groups,
        "optimizer_state_dict": {
            "state": {0: {"step": torch.tensor(float(updates), device=HOST)}},
            "param_groups": groups,
        },
    }


def _model_states(found: Portable, include_frozen: bool) -> dict[str, Any]:
    """Everything but the trainable parameters, as DeepSpeed saves it for one rank; those are named, and empty."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(found.precision, torch.float32)
    trained = [each for each in found.parameters if each.trainable]
    frozen = {
        each.name: torch.cat([chunk.clone() for chunk in found.segments[each.name, WEIGHTS]]).view(each.shape)
        for each in found.parameters
        if include_frozen and not each.trainable and (each.name, WEIGHTS) in found.segments
    }
    shapes = [
        OrderedDict((each.name, torch.Size(each.shape)) for each in trained if each.group == number)
        for number in range(len(found.groups))
    ]
    kind, schedule = found.scheduler or (None, None)
    config = {} if kind is None else {"scheduler": {"type": kind}}
    counters = {name: count for name, count in found.counters.items() if name != "micro_steps"}
    return {
        **found.client_state,
        "module": OrderedDict(
            {
                **{each.name: torch.empty(0, dtype=dtype, device=HOST) for each in trained},
                **frozen,
                **found.buffers,
            }
        ),
        "buffer_names": list(found.buffers),
        "optimizer": None,
        "param_shapes": shapes,
        "frozen_param_shapes": OrderedDict((name, value.shape) for name, value in frozen.items()),
        "frozen_param_fragments": OrderedDict(frozen),
        "shared_params": {alias: each.name for each in found.parameters for alias in each.names[1:]},
        "lr_scheduler": schedule,
        **counters,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": config,
        "ds_version": _DEEPSPEED,
        "universal_checkpoint_info": {"universal_checkpoint_version": _VERSION},
    }


def _save(value: Any, path: Path) -> None:
    """One file, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())

"""The optimizer state of an engine, parameter by parameter, as torch's optimizers have it: out of the core and into it.

Over several ranks with sharded state (stages 1 to 3) a value is brought together from all of them: every rank reads the
same values in the same order, and every rank loads. A rank that does so alone is named by the watch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zeroxide.device.placement import HOST, to_host
from zeroxide.errors import ModelError
from zeroxide.optim.saved_state import SavedEntry, check_saved, take_hyperparameters
from zeroxide.optim.state_view import ParameterState, StateView
from zeroxide.zero.param import ShardedParam, sharded_param_of

__all__ = ["load_engine_state", "numbered_state", "shown_state"]


def shown_state(groups: Sequence[Mapping[str, Any]]) -> StateView:
    """The state by parameter, for `optimizer.state[parameter]`."""
    return StateView({param: _state(_sharded(param), shown=True) for group in groups for param in group["params"]})


def numbered_state(groups: Sequence[Mapping[str, Any]]) -> StateView:
    """The state by the parameters' numbers, for `optimizer.state_dict()`."""
    params = [param for group in groups for param in group["params"]]
    return StateView({number: _state(_sharded(param), shown=False) for number, param in enumerate(params)})


def load_engine_state(given: Any, groups: list[dict[str, Any]]) -> None:
    """Takes hyperparameters and state from what an engine's optimizer, or torch's of the same rule, gave.

    Every rank calls it with the same `given`. A parameter that it has no state for starts anew. Weights are taken only
    where they come as "master", which weights in low precision have. Raises ConfigError before anything has changed.
    """
    sharded_params = [[_sharded(param) for param in group["params"]] for group in groups]
    low = any(sharded.dtype is not torch.float32 for of in sharded_params for sharded in of)
    shapes = [[sharded.shape for sharded in of] for of in sharded_params]
    entries = check_saved(given, groups, shapes, exact=low)
    take_hyperparameters(given, groups)
    for of, saved in zip(sharded_params, entries, strict=True):
        for sharded, entry in zip(of, saved, strict=True):
            _load(sharded, entry)


def _sharded(param: torch.Tensor) -> ShardedParam:
    sharded = sharded_param_of(param)
    if sharded is None:
        raise ModelError(f"a parameter of shape {tuple(param.shape)} in the optimizer's groups belongs to no engine")
    return sharded


def _state(sharded: ShardedParam, *, shown: bool) -> ParameterState:
    def read(part: str) -> torch.Tensor:
        if part == "step":
            return torch.tensor(
                float(sharded.context.core().updates(sharded.unit.index, sharded.position)), device=HOST
            )
        return sharded.read("weights" if part == "master" else part).view(sharded.shape)

    exact = () if sharded.dtype is torch.float32 else ("master",)
    return ParameterState(("step", *sharded.states, *exact), read, shown=shown)


def _load(sharded: ShardedParam, entry: SavedEntry | None) -> None:
    start, count = sharded.own()
    for part, initial in sharded.states.items():
        if entry is None:
            sharded.write_own(part, torch.full((count,), initial, dtype=torch.float32, device=HOST))
            continue
        full = to_host(entry.values[part])
        sharded.write_own(part, full[start : start + count].contiguous())
    if entry is not None and "master" in entry.parts:
        full = to_host(entry.values["master"])
        sharded.write("weights", full)
    sharded.context.core().set_updates(sharded.unit.index, sharded.position, 0 if entry is None else entry.step)

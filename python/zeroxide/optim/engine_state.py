"""The optimizer state of an engine, parameter by parameter, as torch's optimizers have it: out of the core and into it.

Over several ranks with sharded state (stages 1 to 3) a value is brought together from all of them: every rank reads the
same values in the same order, and every rank loads. A rank that does so alone is named by the watch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zeroxide.errors import ModelError
from zeroxide.optim.saved_state import MOMENTS, SavedEntry, check_saved, take_hyperparameters
from zeroxide.optim.state_view import ParameterState, StateView
from zeroxide.zero.param import Seat, seat_of

__all__ = ["load_engine_state", "numbered_state", "shown_state"]


def shown_state(groups: Sequence[Mapping[str, Any]]) -> StateView:
    """The state by parameter, for `optimizer.state[parameter]`."""
    return StateView({param: _state(_seat(param), shown=True) for group in groups for param in group["params"]})


def numbered_state(groups: Sequence[Mapping[str, Any]]) -> StateView:
    """The state by the parameters' numbers, for `optimizer.state_dict()`."""
    params = [param for group in groups for param in group["params"]]
    return StateView({number: _state(_seat(param), shown=False) for number, param in enumerate(params)})


def load_engine_state(given: Any, groups: list[dict[str, Any]]) -> None:
    """Takes hyperparameters and state from what an engine's optimizer, or torch's Adam or AdamW, gave.

    Every rank calls it with the same `given`. A parameter that it has no state for starts anew. Weights are taken only
    where they come as "master", which weights in low precision have. Raises ConfigError before anything has changed.
    """
    seats = [[_seat(param) for param in group["params"]] for group in groups]
    low = any(seat.dtype is not torch.float32 for of in seats for seat in of)
    shapes = [[seat.shape for seat in of] for of in seats]
    entries = check_saved(given, groups, shapes, exact=low)
    take_hyperparameters(given, groups)
    for of, saved in zip(seats, entries, strict=True):
        for seat, entry in zip(of, saved, strict=True):
            _load(seat, entry)


def _seat(param: torch.Tensor) -> Seat:
    seat = seat_of(param)
    if seat is None:
        raise ModelError(f"a parameter of shape {tuple(param.shape)} in the optimizer's groups belongs to no engine")
    return seat


def _state(seat: Seat, *, shown: bool) -> ParameterState:
    def read(part: str) -> torch.Tensor:
        if part == "step":
            return torch.tensor(float(seat.house.core().updates(seat.unit.index, seat.position)))
        return seat.read("weights" if part == "master" else part).view(seat.shape)

    exact = () if seat.dtype is torch.float32 else ("master",)
    return ParameterState(("step", *MOMENTS, *exact), read, shown=shown)


def _load(seat: Seat, entry: SavedEntry | None) -> None:
    start, count = seat.own()
    for part in MOMENTS:
        if entry is None:
            seat.write_own(part, torch.zeros(count))
            continue
        full = entry.values[part].detach().to(device="cpu", dtype=torch.float32).reshape(-1)
        seat.write_own(part, full[start : start + count].contiguous())
    if entry is not None and "master" in entry.parts:
        full = entry.values["master"].detach().to(device="cpu", dtype=torch.float32).reshape(-1)
        seat.write("weights", full.contiguous())
    seat.house.core().set_updates(seat.unit.index, seat.position, 0 if entry is None else entry.step)

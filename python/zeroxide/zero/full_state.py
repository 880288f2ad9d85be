"""The model's state dict with full values, out of an engine and into it.

`module.state_dict()` of an engine's module has tensors of size 0 at stage 3, as DeepSpeed's has. Loading a dict into a
module of an engine is refused at every stage: parameters are empty, or master weights would not hear of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from zeroxide.errors import ConfigError, ModelError
from zeroxide.zero.hook_handle import Hook
from zeroxide.zero.keeper import keeper_of
from zeroxide.zero.seat import House, Seat, seat_of

__all__ = ["FullState", "full_state_dict", "load_full_state_dict", "refuse_loading"]


class FullState:
    """The engine's methods for state dicts."""

    module: nn.Module
    _house: House

    def module_state_dict(
        self, destination: dict[str, Any] | None = None, prefix: str = "", exclude_frozen_parameters: bool = False
    ) -> dict[str, torch.Tensor]:
        """Live weights and buffers with all their values, on rank 0; an empty dict elsewhere. Every rank calls it.

        A parameter at a time is gathered, but rank 0 must hold the model; `save_16bit_model` does not need to.
        """
        found = full_state_dict(self.module, self._house, include_frozen=not exclude_frozen_parameters)
        destination = {} if destination is None else destination
        destination.update({prefix + name: value for name, value in found.items()})
        return destination

    def load_module_state_dict(
        self, checkpoint: dict[str, Any], strict: bool = True, custom_load_fn: Any = None, fetch_z3_params: bool = False
    ) -> None:
        """Makes rank 0's `checkpoint`, a state dict or {"module": one}, the weights and buffers. Every rank calls it.

        Weights are taken as exact as they are given; optimizer state stays. `fetch_z3_params` has no effect: values are
        always brought where they belong. Raises ModelError when names or shapes do not fit, before anything changes.
        """
        if custom_load_fn is not None:
            raise ConfigError(
                "load_module_state_dict: custom_load_fn is not supported: call it inside "
                "zeroxide.zero.GatheredParameters(module.parameters(), modifier_rank=0)",
                path="custom_load_fn",
            )
        given = checkpoint["module"] if isinstance(checkpoint.get("module"), dict) else checkpoint
        load_full_state_dict(self.module, self._house, given, strict=strict)


def full_state_dict(module: nn.Module, house: House, *, include_frozen: bool = True) -> dict[str, torch.Tensor]:
    """Live weights and buffers under the names of `module.state_dict()`, on rank 0; nothing on the others.

    Every rank calls it. Tied parameters are one tensor under several names.
    """
    kept: dict[str, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        seat = seat_of(value) if isinstance(value, torch.Tensor) else None
        if seat is not None and not include_frozen and not seat.trainable:
            continue
        if seat is not None and id(value) not in seen:
            whole = seat.live(seat.read("weights")).view(seat.shape)
            seen[id(value)] = whole if house.ranks.rank == 0 else torch.empty(0)
        if house.ranks.rank == 0:
            found = seen.get(id(value), value)
            kept[name] = found.detach().clone() if found is value and isinstance(value, torch.Tensor) else found
    return kept


def load_full_state_dict(module: nn.Module, house: House, given: Mapping[str, Any], *, strict: bool) -> None:
    """Makes rank 0's `given` the weights and buffers. Every rank calls it; the others may give an empty dict.

    Weights are taken as exact as they are given; optimizer state stays as it is. Raises ModelError on all ranks, before
    anything has changed, when names (`strict`) or shapes do not fit.
    """
    targets = {
        name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)
    }
    plan = house.ranks.gather_objects([list(_problems(targets, given, strict)), [n for n in targets if n in given]])[0]
    problems, names = plan
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ModelError(f"load_module_state_dict: {problems[0]}{more}")
    done: set[int] = set()
    for name in names:
        target = targets[name]
        if id(target) in done:
            continue
        done.add(id(target))
        seat = seat_of(target)
        shape = target.shape if seat is None else seat.shape
        dtype = target.dtype if seat is None else torch.float32
        values = torch.empty(shape, dtype=dtype)
        if house.ranks.rank == 0:
            values.copy_(given[name].detach())
        if house.ranks.world > 1:
            house.broadcast(values, 0, name)
        if seat is None:
            with torch.no_grad():
                target.copy_(values)
        else:
            seat.write("weights", values.view(-1))


def _problems(targets: Mapping[str, torch.Tensor], given: Mapping[str, Any], strict: bool) -> Iterator[str]:
    if strict:
        yield from (f"{name} is missing" for name in targets if name not in given)
        yield from (f"the model has no {name}" for name in given if name not in targets)
    for name, target in targets.items():
        if name in given:
            seat = seat_of(target)
            shape = target.shape if seat is None else seat.shape
            got = given[name]
            if not isinstance(got, torch.Tensor) or got.shape != shape:
                what = tuple(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
                yield f"{name}: expected shape {tuple(shape)}, got {what}"


def refuse_loading(module: nn.Module) -> list[Any]:
    """Makes `load_state_dict` of every module refuse to load into an engine's parameters. Returns their handles."""
    return [
        each.register_load_state_dict_pre_hook(Hook(_refuse))  # type: ignore[no-untyped-call]
        for each in module.modules()
        if each._parameters
    ]


def _refuse(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    for name, param in module._parameters.items():
        if param is None or prefix + name not in state_dict:
            continue
        keeper = keeper_of(param)
        if isinstance(keeper, Seat) and not keeper.holds:
            raise ModelError(
                f"load_state_dict: {keeper.name} has its values in an engine: call engine.load_module_state_dict, "
                "or load inside zeroxide.zero.GatheredParameters(params, modifier_rank=0)",
                name=keeper.name,
            )

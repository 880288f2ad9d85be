"""The engine's optimizer as torch sees it: groups that schedulers and scripts may change, and the step behind them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any, NoReturn

import torch

from zeroxide import _core
from zeroxide.engine.optimizer_state import load_engine_state, numbered_state, shown_state
from zeroxide.errors import ConfigError, ModelError
from zeroxide.optim.groups import plain
from zeroxide.optim.rules import FIXED, core_groups
from zeroxide.optim.saved_state import hooked_load, hooked_save
from zeroxide.optim.state_view import StateView
from zeroxide.params.callers import called_by
from zeroxide.precision.loss_scale import LossScaler
from zeroxide.zero.access.parameter_offload import ParameterOffload

__all__ = ["EngineOptimizer", "check_schedule_call"]


_MOVING = frozenset({"_optimizer_to_device"})
"""The function of Lightning's (2.6.6, fabric/utilities/optimizer.py) that moves state to another device when a run
ends: the core's has its home, and reading all of it would take as long as a step."""


class EngineOptimizer(torch.optim.Optimizer):
    """The rules of its groups over state that the core holds. Made by `zeroxide.initialize`.

    `step` updates every parameter whose gradient has been accumulated since the last one. `state` and `state_dict()`
    are views
    that read from where the state is, when somebody looks at it. Which parameters are in which group is fixed.
    """

    parameter_offload: ParameterOffload
    """DeepSpeed's object for the parameters. The engine sets it, at stage 3 only, as DeepSpeed does."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        core: _core.Offload,
        apply: Callable[[], None],
        scaler: LossScaler,
        check_offload: Callable[[Iterable[str] | None, str], None],
    ) -> None:
        self._placed: list[list[torch.Tensor]] | None = None
        self._view: StateView | None = None
        # torch's schedulers look at the defaults to see which hyperparameters there are.
        names = ("params", "param_names")
        super().__init__(groups, {key: value for key, value in groups[0].items() if key not in names})
        self._core = core
        self._apply = apply
        self._scaler = scaler
        self._check_offload = check_offload
        self._placed = [list(group["params"]) for group in self.param_groups]
        self._fixed = [{key: group.get(key) for key in FIXED} for group in self.param_groups]
        self.overflow = False
        """Whether the last step was left out because a gradient was not finite."""

    @property  # type: ignore[override]
    def state(self) -> StateView:
        """Each parameter's state, as torch has it: "step", what its rule keeps, "master" in low precision."""
        if called_by("lightning", _MOVING):
            return StateView({})
        if self._view is None:
            self._view = shown_state(self.param_groups)
        return self._view

    @state.setter
    def state(self, value: Any) -> None:
        # torch's constructor sets an empty one.
        if self._placed is not None:
            raise ModelError("optimizer.state cannot be set: the state lies in the core; use load_state_dict")

    @property
    def loss_scale(self) -> float:
        """What the next loss will be multiplied by before backward; 1 without fp16."""
        return self._scaler.scale

    @property
    def cur_scale(self) -> float:
        """The same as `loss_scale`."""
        return self._scaler.scale

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One optimizer step over the gradients that have been accumulated; `closure` is not supported."""
        if closure is not None:
            raise ValueError("zeroxide optimizers take no closure: run forward and backward first")
        self.check()
        self._apply()

    def check(self) -> None:
        """Raises ConfigError when groups were changed in a way that a step could not follow, or hold wrong numbers."""
        assert self._placed is not None
        same = len(self.param_groups) == len(self._placed) and all(
            len(group["params"]) == len(placed) and all(map(is_, group["params"], placed))
            for group, placed in zip(self.param_groups, self._placed, strict=True)
        )
        if not same:
            raise ConfigError(
                "optimizer.param_groups holds other parameters, or in other groups, than at initialize, where their "
                "state was placed: put them back, or make a new engine",
                path="optimizer",
            )
        for number, (group, fixed) in enumerate(zip(self.param_groups, self._fixed, strict=True)):
            for key, was in fixed.items():
                if group.get(key) != was:
                    raise ConfigError(
                        f"optimizer group {number}: {key} is now {group.get(key)!r} and was {was!r} at initialize, "
                        "where its state was placed: put it back, or make a new engine",
                        path=key,
                    )
        self.core_groups()

    def offload_states(
        self,
        include: Iterable[str] | None = None,
        device: str = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """See `Engine.offload_states`."""
        self._check_offload(include, device)

    def reload_states(self, non_blocking: bool = False) -> None:
        """See `Engine.reload_states`."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ConfigError: groups are fixed once the state is placed."""
        if self._placed is not None:
            raise ConfigError(
                "add_param_group: an engine's parameters are fixed at initialize, where their state is placed: pass "
                "all of them to zeroxide.initialize, in a group with lr 0 where they are to wait, or make a new engine",
                path="optimizer",
            )
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets every gradient that has been accumulated and not been used."""
        self._core.clear_gradients()

    def core_groups(self) -> list[_core.Rule]:
        """The hyperparameters as they are now, as the core takes them."""
        return core_groups(self.param_groups)

    def hyperparameters(self) -> list[dict[str, Any]]:
        """The groups without their parameters, as JSON can hold them."""
        names = ("params", "param_names")
        return [{key: plain(value) for key, value in group.items() if key not in names} for group in self.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """As torch's; with "master", the exact weights, for those in low precision, and fp16's loss scale.

        "state" is a view that reads each value where somebody looks at it, as a copy; `torch.save`, `pickle` and
        `copy.deepcopy` read all of it and leave plain dicts. Over several ranks with sharded state every rank does so.
        """
        return hooked_save(self, self._pack)

    def _pack(self) -> dict[str, Any]:
        groups, first = [], 0
        for group in self.param_groups:
            count = len(group["params"])
            groups.append({**group, "params": list(range(first, first + count))})
            first += count
        found: dict[str, Any] = {"state": numbered_state(self.param_groups), "param_groups": groups}
        scale = self._scaler.state_dict()
        return found if scale is None else {**found, "loss_scale": scale}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what `state_dict`, or that of torch's optimizer of the same rule, gave, at any world size.

        Every rank calls it with the same dict. "master", where there is one, becomes the exact weight. Raises
        ConfigError, in one line, for whatever does not fit, before anything has changed.
        """
        hooked_load(self, state_dict, self._unpack)

    def _unpack(self, packed: dict[str, Any]) -> None:
        self.check()
        load_engine_state(packed, self.param_groups)
        if packed.get("loss_scale") is not None:
            self._scaler.load_state_dict(packed["loss_scale"])

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise ModelError("an engine's optimizer cannot be copied: copy its state_dict()")

    def __getstate__(self) -> NoReturn:
        raise ModelError("an engine's optimizer cannot be pickled: save its state_dict()")


def check_schedule_call(scheduler: Any, given: dict[str, Any] | None) -> None:
    """Raises ConfigError when `scheduler.step` would not take what `engine.step(lr_kwargs=given)` gives it."""
    if scheduler is None:
        return
    try:
        signature = inspect.signature(scheduler.step)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**(given or {}))
    except TypeError as error:
        kind = type(scheduler).__name__
        raise ConfigError(
            f"the lr_scheduler {kind} does not take engine.step(lr_kwargs={given!r}): {error}; give it what its step "
            'needs, as in engine.step(lr_kwargs={"metrics": loss}), or keep it out of initialize and step it yourself',
            path="lr_scheduler",
        ) from None

"""The engine's optimizer as torch sees it: groups that schedulers and scripts may change, and the step behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zeroxide import _core
from zeroxide.loss_scale import LossScaler
from zeroxide.optim.groups import core_groups

__all__ = ["EngineOptimizer"]


class EngineOptimizer(torch.optim.Optimizer):
    """AdamW or Adam over state that the core holds. Made by `zeroxide.initialize`.

    `step` updates every parameter whose gradient has landed since the last one. The moments are not in `state`: they
    are in the checkpoint of the engine.
    """

    def __init__(
        self, groups: list[dict[str, Any]], core: _core.Offload, apply: Callable[[], None], scaler: LossScaler
    ) -> None:
        # torch's schedulers look at the defaults to see which hyperparameters there are.
        super().__init__(groups, {key: value for key, value in groups[0].items() if key != "params"})
        self._core = core
        self._apply = apply
        self._scaler = scaler
        self.overflow = False
        """Whether the last step was left out because a gradient was not finite."""

    @property
    def loss_scale(self) -> float:
        """What the next loss will be multiplied by before backward; 1 without fp16."""
        return self._scaler.scale

    @property
    def cur_scale(self) -> float:
        """The same as `loss_scale`."""
        return self._scaler.scale

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One optimizer step over the gradients that have landed; `closure` is not supported."""
        if closure is not None:
            raise ValueError("zeroxide optimizers take no closure: run forward and backward first")
        self._apply()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets every gradient that has landed and not been used."""
        self._core.clear_gradients()

    def core_groups(self) -> list[tuple[float, float, float, float, float, bool, bool]]:
        """The hyperparameters as they are now, as the core takes them."""
        return core_groups(self.param_groups)

    def hyperparameters(self) -> list[dict[str, Any]]:
        """The groups without their parameters, as JSON can hold them."""
        return [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]

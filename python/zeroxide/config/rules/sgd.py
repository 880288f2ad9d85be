"""SGD with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zeroxide.config.fields import Flag, NonNegative, Number
from zeroxide.config.rules.rule import Rule
from zeroxide.errors import ConfigError

__all__ = ["SGD"]


@dataclass(frozen=True)
class SGD(Rule):
    """Stochastic gradient descent with momentum, as torch.optim.SGD computes it.

    lr: learning rate. momentum: how much of the buffer an update keeps; the buffer is kept without momentum, too.
    dampening: how much of the gradient does not enter it. weight_decay: `weight_decay * weight` is added to the
    gradient. nesterov: whether the update looks one step ahead, which needs momentum and no dampening.
    """

    name: ClassVar[str] = "sgd"
    types: ClassVar[tuple[str, ...]] = ("SGD",)
    torch: ClassVar[tuple[str, ...]] = ("SGD",)

    lr: NonNegative = 1e-3
    momentum: NonNegative = 0.0
    dampening: Number = 0.0
    weight_decay: NonNegative = 0.0
    nesterov: Flag = False

    def check(self, path: str) -> None:
        """Nesterov's update is defined with momentum and without dampening."""
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ConfigError(
                f"{path}.nesterov = true needs {path}.momentum above 0 and {path}.dampening = 0, got momentum "
                f"{self.momentum:g} and dampening {self.dampening:g}",
                path=f"{path}.nesterov",
            )

    @classmethod
    def entry(cls, saved: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """torch's SGD counts no steps, and has no buffer before the first."""
        if "step" in saved:
            return saved
        if saved.get("momentum_buffer") is None:
            return None
        return {"step": 1.0, **saved}

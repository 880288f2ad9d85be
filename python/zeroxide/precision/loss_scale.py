"""The factor on the loss that keeps small fp16 gradients from vanishing, and how it follows overflows.

The rules are those of DeepSpeed's dynamic loss scaler, so that a run keeps its scales when it changes over:

- An overflow uses up one unit of hysteresis; once a single unit is left, an overflow halves the scale instead, down to
  the minimum. An overflow at the minimum ends the run: another scale would not help.
- After `window` good steps since the last doubling, the scale is doubled and hysteresis is full again. The first good
  step of a run and the first after an overflow do not count.
- With `consecutive_hysteresis`, every good step fills hysteresis up; without, only a doubling does.
"""

from __future__ import annotations

from typing import Any

import torch

from zeroxide.config import LossScale
from zeroxide.errors import NumericsError

__all__ = ["LossScaler"]

FACTOR = 2.0
UNCOUNTED = -1
"""Where good steps are counted from at first and after an overflow: the first of them makes it 0."""


class LossScaler:
    """The present scale. Without settings it is 1 and stays so; with a static one it does not change either."""

    def __init__(self, settings: LossScale | None) -> None:
        self.settings = settings
        self.dynamic = settings is not None and settings.dynamic
        self.scale = 1.0 if settings is None else settings.initial
        """What a loss is multiplied by before backward."""
        self._hysteresis = 1 if settings is None else settings.hysteresis
        self._good_steps = UNCOUNTED
        self._used = False

    def apply(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the scale, in fp32: fp16 has no room for it. The loss itself where there is no scaling."""
        if self.settings is None:
            return loss
        self._used = True
        return loss.float() * self.scale

    def note_scaled(self) -> None:
        """The loss is another rank's, which has scaled it."""
        self._used = True

    def check_used(self) -> None:
        """Raises RuntimeError when gradients are about to be divided by a scale that no loss was multiplied by."""
        if self.settings is not None and self.scale != 1.0 and not self._used:
            raise RuntimeError(
                "the gradients are those of a loss that was not scaled: fp16 needs engine.backward(loss), or "
                "engine.scale(loss).backward(); forget them with engine.zero_grad()"
            )

    def update(self, overflow: bool) -> None:
        """Takes note of one optimizer step. Raises NumericsError for an overflow at the smallest scale."""
        self._used = False
        if self.settings is None or not self.dynamic:
            return
        if overflow:
            self._overflow(self.settings)
        else:
            self._good(self.settings)

    def _overflow(self, settings: LossScale) -> None:
        self._good_steps = UNCOUNTED
        if self._hysteresis > 1:
            self._hysteresis -= 1
            return
        if self.scale <= settings.minimum:
            raise NumericsError(
                f"gradients overflow fp16 at the smallest loss scale, {self.scale:g}: the weights are those before "
                "this step; lower the learning rate or fp16.min_loss_scale, clip gradients, or train in bf16",
                value=self.scale,
            )
        self.scale = max(self.scale / FACTOR, settings.minimum)

    def _good(self, settings: LossScale) -> None:
        self._good_steps += 1
        doubles = self._good_steps >= settings.window
        if doubles:
            self._good_steps = 0
            self.scale *= FACTOR
        if doubles or settings.consecutive_hysteresis:
            self._hysteresis = settings.hysteresis

    def state_dict(self) -> dict[str, Any] | None:
        """Everything that changes, as JSON can hold it; None where nothing ever does."""
        if not self.dynamic:
            return None
        return {"scale": self.scale, "hysteresis": self._hysteresis, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`, unless the config fixes the scale or asks for none.

        Settings that changed in between act at once: the minimum bounds the scale, and hysteresis the count.
        """
        if self.settings is None or not self.dynamic:
            return
        self.scale = max(float(state["scale"]), self.settings.minimum)
        self._hysteresis = min(int(state["hysteresis"]), self.settings.hysteresis)
        self._good_steps = int(state["good_steps"])

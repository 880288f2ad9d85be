"""What quantising gradients loses, kept and added to the next ones (LoCo, Xie et al. 2024).

Of every slice that another rank sums, this rank keeps a moving average of what quantising it has lost, in bf16. What it
sends is then, summed over many backwards, what it would have sent exactly, but for what is kept at the end.

It is forgotten every `reset_steps` optimizer steps; when a step is left out, since gradients that were discarded, and
may have been huge, must not come back; and at every save and load of a checkpoint, which does not hold it: so that a
run that goes on and one that resumes have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zeroxide import _core
from zeroxide.config import ErrorFeedback
from zeroxide.device.placement import memory_at
from zeroxide.precision.loss_scale import LossScaler
from zeroxide.zero.unit import Unit

__all__ = ["Residuals"]


class Residuals:
    """What is kept, and when it is forgotten.

    scaler: gradients are multiplied with its scale; what was kept of an older scale is brought to the present one.
    """

    def __init__(
        self,
        core: _core.Offload,
        units: Sequence[Unit],
        places: Sequence[tuple[int, int]],
        settings: ErrorFeedback,
        scaler: LossScaler,
    ) -> None:
        self.beta = settings.beta
        self.factor = 1.0
        """What gradients of this backward have been multiplied with since those of the last."""
        self._reset_steps = settings.reset_steps
        self._scaler = scaler
        self._scale = scaler.scale
        self._all = memory_at(*core.room("residuals"), torch.bfloat16)
        self._of_unit = {
            unit.index: self._all[start // 2 : (start + size) // 2].view(unit.groups.world - 1, -1)
            for unit, (start, size) in zip(units, places, strict=True)
            if size
        }

    def begin_backward(self) -> None:
        """Gradients with the present loss scale are about to be sent."""
        self.factor = self._scaler.scale / self._scale
        self._scale = self._scaler.scale

    def of(self, unit: Unit, piece: int) -> torch.Tensor:
        """What is kept of the unit's slice `piece`, one that another rank sums: bf16, an element for each of the
        slice."""
        own = unit.groups.owners().index(unit.groups.everyone[unit.groups.rank])
        return self._of_unit[unit.index][piece - (piece > own)]

    def after_step(self, steps: int, *, left_out: bool) -> None:
        """The optimizer has made its step number `steps`, counted from 1, or has left it out."""
        if left_out or steps % self._reset_steps == 0:
            self.forget()

    def forget(self) -> None:
        """Nothing is kept any more."""
        self._all.zero_()

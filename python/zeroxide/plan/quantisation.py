"""What of a model travels between ranks as block-wise integers, and where the config asks for that in vain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zeroxide import _core
from zeroxide.config import Config
from zeroxide.distributed import Ranks
from zeroxide.plan.discover import UnitPlan

__all__ = ["QuantisationPlan", "plan_quantisation"]

_SHARED = (
    'the ranks share this host\'s memory, through which nothing is sent; with zeroxide.transport = "collective" all is'
)
_ALONE = "there is one rank, which sends nothing"
_FROZEN = "the model has no units of frozen weights in the dtype that it computes in"


@dataclass(frozen=True)
class QuantisationPlan:
    """What travels as integers."""

    weights: tuple[bool, ...] = ()
    """Of each unit, whether its weights travel as int8; empty where nothing is sent."""
    gradients: bool = False
    """Whether gradients travel as int4."""
    feedback: bool = False
    """Whether what they lose is kept."""
    secondary: int = 0
    """Ranks in a group that keeps codes of all weights for its own members; 0 for all."""
    no_effect: tuple[tuple[str, str], ...] = ()
    """Keys that ask for integers where nothing travels, each with the reason."""

    def for_core(self) -> _core.Quantisation:
        """The same, as the core takes it."""
        return _core.Quantisation(
            near=self.secondary, weights=list(self.weights), gradients=self.gradients, feedback=self.feedback
        )


def plan_quantisation(
    config: Config, ranks: Ranks, units: Sequence[UnitPlan], transport: str, compute: torch.dtype
) -> QuantisationPlan:
    """What travels as integers, of `units` whose live weights are of dtype `compute`.

    A unit with weights that are of another dtype or no numbers, all of them frozen, travels as it is.
    """
    asked = {
        "zero_quantized_weights": config.zero.quantized_weights,
        "zero_quantized_nontrainable_weights": config.zero.quantized_frozen,
        "zero_quantized_gradients": config.zero.quantized_gradients,
        "zeropp_loco_param": config.zero.feedback is not None,
    }
    keys = [f"zero_optimization.{key}" for key, wanted in asked.items() if wanted]
    if ranks.world == 1 or transport == "shared":
        reason = _ALONE if ranks.world == 1 else _SHARED
        return QuantisationPlan(no_effect=tuple((key, reason) for key in keys))
    plain = [all(entry.dtype is compute and not entry.opaque for entry in unit.params) for unit in units]
    frozen = [same and not unit.trainable for same, unit in zip(plain, units, strict=True)]
    vain = config.zero.quantized_frozen and not any(frozen)
    key = "zero_optimization.zero_quantized_nontrainable_weights"
    return QuantisationPlan(
        weights=tuple(plain if config.zero.quantized_weights else frozen if config.zero.quantized_frozen else ()),
        gradients=config.zero.quantized_gradients,
        feedback=config.zero.feedback is not None,
        secondary=config.zero.secondary if config.zero.secondary < ranks.world else 0,
        no_effect=((key, _FROZEN),) if vain else (),
    )

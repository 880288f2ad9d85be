"""What is done with gradients before an optimizer step: keys at the top of the document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from zeroxide.config.facts import Resolved
from zeroxide.config.fields import Flag, NoEffect, NonNegative, Section, choice
from zeroxide.config.given import Given, agree

__all__ = ["GradientKeys", "Gradients", "resolve"]

_SUMMED = "gradients are summed in fp32 and scaled once"


class GradientKeys(Section):
    """The keys."""

    gradient_clipping: NonNegative | None = None
    """Largest global norm of the gradients; 0 leaves them as they are."""
    gradient_allreduce_op: Annotated[Literal["mean", "sum"], choice("mean", "sum")] = "mean"
    """Whether gradients are averaged or summed over ranks."""
    prescale_gradients: Annotated[Flag | None, NoEffect(_SUMMED)] = None
    gradient_predivide_factor: Annotated[Any, NoEffect(_SUMMED)] = None
    seq_parallel_communication_data_type: Annotated[Any, NoEffect("gradients are summed in fp32")] = None
    disable_allgather: Annotated[Any, NoEffect("a unit is gathered by one collective")] = None


@dataclass(frozen=True)
class Gradients(Resolved):
    """How gradients are summed and clipped."""

    key: ClassVar[str] = "gradients"

    clipping: float | None = 1.0
    """Largest global gradient norm; `None` leaves gradients as they are."""
    clipping_is_default: bool = True
    """Whether nobody asked for that norm."""
    reduce_sum: bool = False
    """Whether gradients are summed over ranks instead of averaged."""

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`."""
        op = "sum" if self.reduce_sum else "mean"
        return {"gradient_clipping": self.clipping or 0.0, "gradient_allreduce_op": op}


def resolve(keys: GradientKeys, given: Given) -> Gradients:
    """Clipping and the sum over ranks. Raises ConfigError where the shortcut contradicts the document."""
    clipping = agree(
        "gradient_clipping", given.shortcuts.gradient_clipping, "gradient_clipping", keys.gradient_clipping
    )
    return Gradients(
        clipping=Gradients.clipping if clipping is None else clipping or None,
        clipping_is_default=clipping is None,
        reduce_sum=keys.gradient_allreduce_op == "sum",
    )

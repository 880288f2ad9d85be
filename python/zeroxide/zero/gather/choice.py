"""Which way weights come together."""

from __future__ import annotations

from zeroxide import _core
from zeroxide.plan.home import Home
from zeroxide.plan.plan import Plan
from zeroxide.zero.gather.quantised import QuantisedWeights
from zeroxide.zero.gather.weight_gather import (
    CollectiveWeights,
    HostWeights,
    SharedWeights,
    SingleRankWeights,
    WeightGather,
)
from zeroxide.zero.messages import Messages
from zeroxide.zero.unit import Unit

__all__ = ["make_weight_gather"]


def make_weight_gather(core: _core.Offload, plan: Plan, units: list[Unit], messages: Messages) -> WeightGather:
    """What brings the weights of `units` together from the ranks that `messages` go between."""
    stays = plan.weights is Home.HOST
    if plan.world == 1:
        return SingleRankWeights(core, stays=stays, params_always_full=plan.params_always_full)
    if plan.transport == "shared":
        shown = units if plan.params_always_full else ()
        return HostWeights(core, messages, shown) if stays else SharedWeights(core, messages, shown)
    if any(plan.quantisation.weights):
        return QuantisedWeights(core, messages, units, plan)
    refreshed = units if plan.params_always_full and not plan.replicated else ()
    return CollectiveWeights(core, messages, stays, refreshed, params_always_full=plan.params_always_full)

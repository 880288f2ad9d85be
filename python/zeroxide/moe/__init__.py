"""Layers of experts, and experts spread over ranks: what DeepSpeed has in `deepspeed.moe`."""

from zeroxide.moe.experts import Experts
from zeroxide.moe.gating import Routes, top1gating, top2gating, topkgating
from zeroxide.moe.layer import MoE, MOELayer, TopKGate
from zeroxide.moe.parameters import (
    configure_moe_param_groups,
    has_moe_layers,
    is_moe_param,
    split_params_into_different_moe_groups_for_optimizer,
)

__all__ = [
    "Experts",
    "MOELayer",
    "MoE",
    "Routes",
    "TopKGate",
    "configure_moe_param_groups",
    "has_moe_layers",
    "is_moe_param",
    "split_params_into_different_moe_groups_for_optimizer",
    "top1gating",
    "top2gating",
    "topkgating",
]

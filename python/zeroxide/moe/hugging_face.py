"""Experts of Hugging Face's models in place: the fused ones of transformers 5, of which each layer has two parameters.

The block around them, its router and its shared experts stay as they are. The module of the experts gets a class whose
forward is `gated_experts`, with the experts of other ranks reached by an exchange.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from zeroxide.config import Config
from zeroxide.errors import ConfigError, ModelError
from zeroxide.kernels.permute import expert_order
from zeroxide.moe.dispatch import combine, dispatch, expert_counts
from zeroxide.moe.exchange import ExpertExchange
from zeroxide.moe.fused import gated_experts

__all__ = ["WEIGHTS", "find_fused_experts", "fused_experts_in", "replace_forward"]

WEIGHTS = ("gate_up_proj", "down_proj")
"""The parameters of fused experts, (experts, 2 * features, width) and (experts, width, features)."""


def find_fused_experts(module: nn.Module, config: Config) -> list[tuple[str, nn.Module]]:
    """The modules with fused experts that `expert_parallel` means, with their names; none where it is off.

    Raises ConfigError where the model is of another family than `preset_model` says, or has no such experts, and
    ModelError for experts that are of another kind.
    """
    if not config.expert_parallel.enabled:
        return []
    preset = config.expert_parallel.preset_model
    if preset is not None:
        family = str(getattr(getattr(module, "config", None), "model_type", "none"))
        if family != preset and not family.startswith(f"{preset}_"):
            raise _wrong("preset_model", f"{family!r}, the model's model_type", preset)
    found = [(name, each) for name, each in fused_experts_in(module) if _is_meant(name, config)]
    if not found:
        raise _wrong(
            "enabled",
            f"false: {type(module).__name__} has no fused experts ({' and '.join(WEIGHTS)} of three dimensions) that "
            "the patterns name",
            True,
        )
    for name, each in found:
        problem = _problem(each)
        if problem is not None:
            raise ModelError(
                f"expert_parallel: {name}, {type(each).__name__}, {problem}, which is not built in zeroxide yet: leave "
                "it out by moe_layer_pattern, or expert_parallel off",
                name=name,
            )
    return found


def fused_experts_in(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of `module` whose experts are two parameters of three dimensions, with its name."""
    for name, each in module.named_modules():
        weights = [each._parameters.get(weight) for weight in WEIGHTS]
        if all(weight is not None and weight.dim() == 3 for weight in weights):
            yield name, each


def _is_meant(name: str, config: Config) -> bool:
    pattern, experts = config.expert_parallel.moe_layer_pattern, config.expert_parallel.expert_pattern
    layer, _, last = name.rpartition(".")
    if pattern is not None and re.search(pattern, layer) is None:
        return False
    return experts is None or re.fullmatch(experts, last) is not None


def _problem(experts: nn.Module) -> str | None:
    gate_up, down = (experts._parameters[weight] for weight in WEIGHTS)
    assert gate_up is not None
    assert down is not None
    if len(experts._parameters) > len(WEIGHTS) or getattr(experts, "has_bias", False):
        return f"has parameters beside {' and '.join(WEIGHTS)}"
    if getattr(experts, "is_transposed", False) or gate_up.shape[2] != down.shape[1]:
        return "has transposed weights"
    if gate_up.shape[1] != 2 * down.shape[2]:
        return "has experts without a gate"
    if getattr(experts, "has_post_expert_norm", False):
        return "normalises what its experts make"
    if not callable(getattr(experts, "act_fn", None)) and _own_gate(experts) is None:
        return "has no act_fn"
    return None


def _own_gate(experts: nn.Module) -> Any:
    """What a class makes of both products that is something else than act_fn(gate) * up; None for that."""
    from transformers.integrations import moe

    gate = getattr(experts, "_apply_gate", None)
    return None if gate is None or gate.__func__ is moe._default_apply_gate else gate


def replace_forward(experts: nn.Module, exchange: ExpertExchange | None) -> None:
    """Has fused experts computed by `gated_experts`, with those of other ranks through `exchange`."""
    experts.exchange = exchange  # type: ignore[assignment]
    kind = type(experts)
    experts.__class__ = type(kind.__name__, (kind,), {"forward": _forward, "__module__": kind.__module__})


def _forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states: (tokens, width). top_k_index, top_k_weights: (tokens, k)."""
    weights, exchange = (self.gate_up_proj, self.down_proj), self.exchange
    own_gate = _own_gate(self)
    bent = (None, own_gate) if own_gate is not None else (self.act_fn, None)
    if exchange is None:
        return gated_experts(hidden_states, top_k_index, top_k_weights, *weights, *bent)
    sources, positions = expert_order(top_k_index)
    counts = expert_counts(top_k_index, self.gate_up_proj.shape[0] * exchange.size)
    arrived, expert, way_back = exchange.bring(dispatch(hidden_states, sources, positions), counts)
    made = gated_experts(
        arrived, expert[:, None], torch.ones_like(expert[:, None], dtype=torch.float32), *weights, *bent
    )
    return combine(way_back(made), top_k_weights.float(), sources, positions)


def _wrong(key: str, expected: str, got: object) -> ConfigError:
    path = f"expert_parallel.{key}"
    shown = repr(got).lower() if isinstance(got, bool) else repr(got)
    return ConfigError(f"{path}: expected {expected}, got {shown}", path=path, expected=expected, got=shown)

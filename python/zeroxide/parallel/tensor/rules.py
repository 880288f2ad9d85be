"""Which rule each module of a model has: the model's own, as Hugging Face's `tp_plan`, or `TPLayerSpec`s."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from zeroxide.errors import ModelError
from zeroxide.moe.experts import is_spread
from zeroxide.parallel.tensor.presets import PRESETS
from zeroxide.parallel.tensor.spec import OWN_PLAN, LayerRule, TPLayerSpec, rule_of

__all__ = ["find_rules"]

_STYLES: dict[str, LayerRule] = {
    "colwise": LayerRule("column"),
    "colwise_rep": LayerRule("column", gather_output=True),
    "colwise_gather_output": LayerRule("column", gather_output=True),
    "packed_colwise": LayerRule("column", 2),
    "rowwise": LayerRule("row"),
    "rowwise_rep": LayerRule("row", split_input=True),
    "rowwise_split_input": LayerRule("row", split_input=True),
    "embedding_rowwise": LayerRule("row"),
    "embedding_colwise": LayerRule("column", gather_output=True),
    "replicated_with_grad_allreduce": LayerRule("skip", grad_allreduce=True),
    "replicate": LayerRule("skip"),
}
"""Hugging Face's names (transformers/distributed/tensor_parallel.py of 5.23), with what they come to."""


def find_rules(
    module: nn.Module, specs: Sequence[TPLayerSpec] = (), preset: str | None = None, *, defaults: bool = True
) -> dict[str, LayerRule]:
    """The rule of each module, by its name, of those that have one.

    specs: the user's, which come first. preset: whose rules are taken instead of the model's own. defaults: whether the
    model's own, or those of a preset for its type, hold for what `specs` say nothing of.

    Raises ModelError for a model that neither has rules, nor has been given any, and for a plan that asks for what is
    not built.
    """
    found: dict[str, LayerRule] = {}
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    if defaults and preset is None and (plan := _own_plan(module)):
        found |= dict(_by_plan(module, plan))
    elif defaults or preset is not None:
        chosen = PRESETS.get(preset or str(model_type), ())
        found |= dict(_by_specs(module, chosen, preset or model_type, f'preset "{preset or model_type}"'))
    found |= dict(_by_specs(module, specs, model_type, "partition_config.layer_specs"))
    if not any(rule.kind != "skip" for rule in found.values()):
        raise ModelError(
            f"{type(module).__name__} has no tp_plan, and no rule cuts any of its layers: give "
            'tensor_parallel.partition_config.layer_specs, such as [{"patterns": [".*up_proj.weight$"], '
            '"partition_type": "column"}, {"patterns": [".*down_proj.weight$"], "partition_type": "row"}], or '
            f"tensor_parallel.preset_model ({', '.join(PRESETS)})"
        )
    return found


def _own_plan(module: nn.Module) -> Mapping[str, str]:
    plan: Any = getattr(module, "_tp_plan", None)
    if not plan:
        plan = getattr(getattr(module, "config", None), "base_model_tp_plan", None)
    return plan if isinstance(plan, Mapping) else {}


def _by_plan(module: nn.Module, plan: Mapping[str, str]) -> Iterator[tuple[str, LayerRule]]:
    # Experts that are spread over ranks stay as they are on each tensor rank.
    spread = {name for name, param in module.named_parameters(remove_duplicate=False) if is_spread(param)}
    owners = {name.rpartition(".")[0] for name in spread}
    modules = {name for name, _ in module.named_modules(remove_duplicate=False)} - owners
    params = {name for name, _ in module.named_parameters(remove_duplicate=False)} - spread
    for key, style in plan.items():
        matches = re.compile(re.escape(key).replace(r"\*", r"\d+")).fullmatch
        rule = _STYLES.get(style)
        whole = [name for name in sorted(modules) if matches(name)]
        single = [name for name in sorted(params) if matches(name)]
        if _are_experts(module, whole or [name.rpartition(".")[0] for name in single]):
            # Every tensor rank computes all of them alike; `expert_parallel` is what spreads them.
            continue
        if (whole or single) and (rule is None or (single and rule.kind != "skip")):
            raise ModelError(
                f'{(whole or single)[0]} has "{style}" in the model\'s tp_plan, which is not built: give '
                "tensor_parallel.partition_config with use_default_specs false and layer_specs of your own",
                name=(whole or single)[0],
            )
        for name in whole:
            assert rule is not None
            yield (
                name,
                LayerRule(
                    rule.kind,
                    rule.blocks,
                    gather_output=rule.gather_output,
                    split_input=rule.split_input,
                    grad_allreduce=rule.grad_allreduce,
                    origin=f'{OWN_PLAN} "{style}"',
                ),
            )


def _are_experts(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether these are all fused experts: modules with parameters of three dimensions, one an expert."""
    found = [module.get_submodule(name) for name in names]
    return bool(found) and all(
        each._parameters and all(param is None or param.dim() == 3 for param in each._parameters.values())
        for each in found
    )


def _by_specs(
    module: nn.Module, specs: Sequence[TPLayerSpec], model_type: str | None, origin: str
) -> Iterator[tuple[str, LayerRule]]:
    for name, _ in module.named_parameters(remove_duplicate=False):
        if not name.endswith("weight"):
            continue
        spec = next((each for each in specs if each.holds_for(name, model_type)), None)
        if spec is None:
            continue
        owner = name.rpartition(".")[0]
        _check_dim(module.get_submodule(owner), spec, name)
        yield owner, rule_of(spec, origin)


def _check_dim(module: nn.Module, spec: TPLayerSpec, name: str) -> None:
    if spec.partition_dim is None:
        return
    rows_are_inputs = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
    follows = int((spec.partition_type == "column") == rows_are_inputs)
    if spec.partition_dim % 2 != follows:
        raise ModelError(
            f"{name}: partition_dim {spec.partition_dim} contradicts its layer, a {type(module).__name__}, whose "
            f'"{spec.partition_type}" cuts dimension {follows}: leave partition_dim out',
            name=name,
        )

"""DeepSpeed's estimates of memory, answered by zeroxide's planner: what a step takes here, counted and not estimated.

Training in bf16 with AdamW, in host memory and on disk, without activations, where the model computes on the CPU; a GPU
has its own part beside. Nothing of a model is loaded or changed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zeroxide.config import format_bytes, load
from zeroxide.distributed import Ranks
from zeroxide.errors import ConfigError
from zeroxide.params.handle import shape_of
from zeroxide.plan.plan import Plan, make_plan

__all__ = [
    "Estimate",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
    "estimates",
    "model_to_params",
]

_HOMES: dict[int, list[tuple[str | None, str]]] = {
    2: [(None, "cpu"), (None, "nvme")],
    3: [("cpu", "cpu"), ("cpu", "nvme"), ("nvme", "nvme")],
}
"""By stage, homes of parameters and of optimizer state."""


@dataclass(frozen=True)
class Estimate:
    """What one rank takes with one choice of homes, in bytes; memory is beside what Python and torch take."""

    param: str | None
    optimizer: str
    memory: int
    disk: int


def estimates(module: nn.Module, stage: int, local: int, nodes: int) -> Iterator[Estimate]:
    """Yields the choices for `local` ranks on each of `nodes` hosts. Raises ModelError for a model that cannot be
    trained."""
    if local < 1 or nodes < 1:
        raise ConfigError(
            f"an estimate for {nodes} hosts with {local} ranks each: expected at least one", path="num_nodes"
        )
    for param, optimizer in _HOMES[stage]:
        zero: dict[str, Any] = {"stage": stage, "offload_optimizer": {"device": optimizer, "nvme_path": "."}}
        if param is not None:
            zero["offload_param"] = {"device": param, "nvme_path": "."}
        world = local * nodes
        given: dict[str, Any] = {
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW"},
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
        }
        config = load(given, world_size=world)
        one_host = nodes == 1
        ranks = Ranks(world=world, local_world=local, backend="fake", same_host=one_host, shares_memory=one_host)
        plan: Plan = make_plan(module, config, threads=1, resident=0, ranks=ranks)
        yield Estimate(param, optimizer, plan.expected_peaks()["total"], plan.disk_bytes)


def model_to_params(model: nn.Module) -> tuple[int, int]:
    """(parameters, those of the module that has most itself); what is shared counts once."""
    sizes = {id(param): shape_of(param).numel() for param in model.parameters()}
    largest = max(
        (sum(sizes[id(each)] for each in module.parameters(recurse=False)) for module in model.modules()), default=0
    )
    return sum(sizes.values()), largest


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Prints what each rank takes at stage 3. `additional_buffer_factor` has no effect: nothing is guessed."""
    _print(model, 3, num_gpus_per_node, num_nodes)


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Prints what each rank takes at stage 2. `additional_buffer_factor` has no effect: nothing is guessed."""
    _print(model, 2, num_gpus_per_node, num_nodes)


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """As `..._all_live`, of a model of layers of `largest_layer_params` each."""
    _print(_stack(total_params, largest_layer_params), 3, num_gpus_per_node, num_nodes)


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """As `..._all_live`, of a model of 32 layers."""
    _print(_stack(total_params, math.ceil(total_params / 32)), 2, num_gpus_per_node, num_nodes)


class _Layer(nn.Module):
    """Nothing but its parameters."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(elements, device="meta", dtype=torch.bfloat16))


def _stack(total: int, largest: int) -> nn.Module:
    if not 0 < largest <= total:
        raise ConfigError(
            f"an estimate of {total} parameters in all and {largest} in the largest layer: expected the first to be at "
            "least the second, and that above 0",
            path="largest_layer_params",
        )
    full, rest = divmod(int(total), int(largest))
    return nn.Sequential(*(_Layer(int(largest)) for _ in range(full)), *([_Layer(rest)] if rest else []))


def _print(model: nn.Module, stage: int, local: int, nodes: int) -> None:
    total, largest = model_to_params(model)
    lines = [
        f"zeroxide at stage {stage} on the CPU, {nodes} host(s) with {local} rank(s) each, beside activations:",
        f"a model of {total / 1e6:.0f} M parameters, {largest / 1e6:.0f} M in its largest layer",
        "  memory a rank |   disk a rank | options",
    ]
    for each in estimates(model, stage, local, nodes):
        param = "" if each.param is None else f"offload_param={each.param}, "
        disk = format_bytes(each.disk) if each.disk else "none"
        lines.append(f"  {format_bytes(each.memory):>13} | {disk:>13} | {param}offload_optimizer={each.optimizer}")
    sys.stdout.write("\n".join(lines) + "\n")

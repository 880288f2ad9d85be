"""What a model or a config cannot have, found before anything is placed."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from zeroxide.config import Config
from zeroxide.device.placement import HOST, device_kind, has_values, in_host_memory, is_host
from zeroxide.distributed import Ranks, UnitGroups
from zeroxide.errors import ConfigError, ModelError
from zeroxide.params.handle import handle_of
from zeroxide.plan.parameters import ParameterPlan, check_sharing
from zeroxide.precision.bits import FLOATS, why_not_bytes

__all__ = [
    "check_experts",
    "check_gradients",
    "check_max_norm",
    "check_model",
    "check_order",
    "check_routed",
    "check_together",
    "check_transport",
]


def check_model(module: nn.Module, entries: list[ParameterPlan], config: Config, device: torch.device = HOST) -> None:
    """Refuses models that have nothing to train on `device`, or parameters that cannot be laid out there."""
    if not entries:
        raise ModelError(f"{type(module).__name__} has no parameters: there is nothing to train")
    if config.optimizer is not None and not any(entry.trainable for entry in entries):
        raise ModelError(
            f"every parameter of {type(module).__name__} is frozen: nothing to train; without an optimizer "
            "in the config it can be used for evaluation"
        )
    devices = Counter(device_kind(entry.param) for entry in entries)
    if len(devices) > 1:
        (first, _), (other, _) = devices.most_common(2)
        odd = next(entry for entry in entries if device_kind(entry.param) == other)
        raise ModelError(
            f"parameters are on two devices: {odd.name} is on {odd.param.device}, most others on {first}; "
            "move the model to one device first",
            name=odd.name,
        )
    for entry in entries:
        handle = handle_of(entry.param)
        if handle is not None and handle.in_engine:
            raise ModelError(
                f"{entry.name} belongs to an engine, or did at stage 3 until that was destroyed: build the model "
                "again, and load what engine.module_state_dict() or a checkpoint has kept",
                name=entry.name,
            )
        problem = why_not_bytes(entry.param)
        if problem is not None:
            raise ModelError(f"{entry.name} {problem}: parameters are dense tensors of numbers", name=entry.name)
        if entry.trainable and entry.param.dtype not in FLOATS:
            dtype = str(entry.param.dtype).removeprefix("torch.")
            raise ModelError(
                f"{entry.name} is trained and has dtype {dtype}: expected fp32, bf16 or fp16; "
                "cast it, or freeze it with requires_grad_(False): frozen parameters keep any dtype",
                name=entry.name,
            )
        if has_values(entry.param) and not in_host_memory(entry.param) and entry.param.device != device:
            raise ModelError(
                f"{entry.name} is on {entry.param.device}, and the model is to compute on {device}: build the model "
                "there, in host memory or on the meta device, or set zeroxide.device",
                name=entry.name,
            )
    check_sharing(entries)


def check_max_norm(module: nn.Module, config: Config, ranks: Ranks) -> None:
    """Refuses embeddings that change their weight in forward, for weights that move or are shared: over ranks, each
    would rescale the rows that it looked up, and only those of its own shard would last."""
    if ranks.world == 1 and config.zero.stage < 3:
        return
    for name, each in module.named_modules():
        if isinstance(each, nn.Embedding | nn.EmbeddingBag) and each.max_norm is not None:
            raise ModelError(
                f"{name} has max_norm = {each.max_norm}: it rescales its weight in place in forward, which other "
                "ranks' shards or weights that move know nothing of; only stages 0 to 2 on one rank allow that",
                name=name,
            )


def check_order(config: Config, ranks: Ranks, device: torch.device) -> None:
    """Refuses micro-batches layer by layer where they cannot be."""
    if config.zeroxide.accumulation_order != "layers":
        return
    problem = None
    if not is_host(device):
        problem = f"the model computes on {device}, where backward of all micro-batches has one thread: not built yet"
    elif config.mesh is not None and max(config.mesh.pp, config.mesh.tp, config.mesh.sp, config.mesh.ep) > 1:
        problem = "ranks have parts of the model, of sequences or of experts: not built yet"
    elif ranks.world > 1 and config.zero.quantized_gradients:
        problem = "gradients travel as integers: not built yet"
    elif config.flops_profiler.enabled:
        problem = "flops_profiler measures one forward, and several would be under way"
    if problem is not None:
        raise ConfigError(
            f'zeroxide.accumulation_order "layers": {problem}; use "batches"',
            path="zeroxide.accumulation_order",
            expected='"batches"',
            got='"layers"',
        )


def check_together(config: Config, ranks: Ranks, device: torch.device) -> None:
    """Refuses what the config asks for that does not go with the ranks, the device or what else it asks for."""
    check_transport(config, ranks)
    check_order(config, ranks, device)
    check_experts(config)
    check_routed(config, ranks, device)
    check_activations(config, device)


def check_activations(config: Config, device: torch.device) -> None:
    """Refuses activations on disk where they are in memory that no file is written from."""
    if config.activations.path is not None and not is_host(device):
        raise ConfigError(
            f'zeroxide.activations = "{config.activations.home}": the model computes on {device}, whose activations do '
            "not go to the disk yet; use activation_checkpointing.cpu_checkpointing, which keeps them in host memory",
            path="zeroxide.activations",
            expected='"memory"',
            got=f'"{config.activations.home}"',
        )


def check_transport(config: Config, ranks: Ranks) -> None:
    """Refuses shared memory between ranks that have none."""
    if config.zeroxide.transport == "shared_memory" and not ranks.shares_memory:
        raise ConfigError(
            'zeroxide.transport: "shared_memory" needs all ranks on one host, each allowed to open the others\' memory '
            'under /proc; use "auto"',
            path="zeroxide.transport",
            expected='"auto" or "collective"',
            got='"shared_memory"',
        )


def check_experts(config: Config) -> None:
    """Refuses what does not go with experts that are spread over ranks."""
    if config.mesh is None or config.mesh.ep == 1:
        return
    quantised = config.zero.quantized_weights or config.zero.quantized_gradients
    for path, wrong, got, instead in (
        ("zeroxide.transport", config.zeroxide.transport == "shared_memory", '"shared_memory"', '"auto"'),
        ("zeroxide.durable_every", config.zeroxide.durable_every > 0, str(config.zeroxide.durable_every), "0"),
        ("zero_optimization.zero_quantized_weights", quantised, "true", "false"),
    ):
        if wrong:
            raise ConfigError(
                f"{path}: {got} is not built for experts that are spread over ranks (zeroxide.mesh.ep): use {instead}",
                path=path,
                expected=instead,
                got=got,
            )


def check_routed(config: Config, ranks: Ranks, device: torch.device) -> None:
    """Refuses what does not go with experts that run only where tokens go to them."""
    asked = config.zeroxide.unrouted_experts
    if asked == "update":
        return
    mesh, zero = config.mesh, config.zero
    axes = mesh is not None and max(mesh.pp, mesh.tp, mesh.sp, mesh.ep) > 1
    quantised = zero.quantized_weights or zero.quantized_gradients
    layers = config.zeroxide.accumulation_order == "layers"
    lazy = asked == "lazy"
    for wrong, why in (
        (not is_host(device), f"the model computes on {device}"),
        (axes, "ranks have parts of the model, of sequences or of experts"),
        (quantised, "weights or gradients travel as integers"),
        (layers, 'zeroxide.accumulation_order is "layers", where all micro-batches come to the same units'),
        (lazy and zero.stage < 3, f"stage {zero.stage} shows weights at all times, also those that are behind"),
        (lazy and ranks.world > 1, "several ranks would have to make up for steps together"),
        (lazy and config.zeroxide.durable_every > 0, "commits of a durable run do not know of steps to be made up for"),
    ):
        if wrong:
            raise ConfigError(
                f'zeroxide.unrouted_experts: "{asked}" does not go with this: {why}; use "update"',
                path="zeroxide.unrouted_experts",
                expected='"update"',
                got=f'"{asked}"',
            )


def check_gradients(config: Config, groups: UnitGroups, transport: str) -> None:
    """Refuses gradients on disk where their step does not read from there, or other ranks write where they are kept."""
    if config.zeroxide.gradients != "disk":
        return
    if config.zero.offload_optimizer.kind != "nvme":
        why = "needs the optimizer state on disk, with which the step reads them: offload_optimizer to nvme"
    elif groups.shard.size > 1 and groups.replicate.size > 1 and transport == "collective":
        why = "does not go with hybrid sharding over collectives, where replicas exchange sums in memory"
    else:
        return
    raise ConfigError(
        f'zeroxide.gradients: "disk" {why}; or use "auto"',
        path="zeroxide.gradients",
        expected='"auto" or "host"',
        got='"disk"',
    )

"""Which share of the optimizer state is at home on the device that computes, and what updates it there."""

from __future__ import annotations

import logging

import torch
from torch import nn

from zeroxide import _core
from zeroxide.config import Config
from zeroxide.device.placement import device_room, is_host
from zeroxide.errors import ConfigError, DeviceError
from zeroxide.kernels import Launcher
from zeroxide.kernels.launchers import make_launcher

__all__ = ["LEFT_TO_ACTIVATIONS", "place_state"]

logger = logging.getLogger("zeroxide")

LEFT_TO_ACTIVATIONS = 2
"""Without `zeroxide.device_memory` one part in so many of a device's memory is left to activations and torch."""

_RATIO = "zero_optimization.offload_optimizer.ratio"


def place_state(
    config: Config, module: nn.Module, device: torch.device, world: int
) -> tuple[_core.DeviceRequest | None, Launcher | None]:
    """What is asked of `device`, on which `module` is to compute with `world` ranks, and what launches the kernels that
    update state there. No request where that is the host, no launcher where all state stays in host memory.

    Where nothing asks for state on the device by name and kernels cannot run, it stays in host memory, with one line.
    Raises ConfigError for a ratio of state on a device that cannot be, DeviceError where kernels cannot run.
    """
    limit = config.zeroxide.device_memory
    share = 1.0 - config.zero.cpu_share
    problem = _why_not(config, module, device, world)
    if share and problem is not None:
        raise ConfigError(
            f"{_RATIO} = {config.zero.cpu_share:g}: {problem}; use 1",
            path=_RATIO,
            expected="1",
            got=f"{config.zero.cpu_share:g}",
        )
    if is_host(device):
        if limit is not None:
            logger.warning("config key zeroxide.device_memory has no effect: the model computes in host memory")
        return None, None
    stay = config.zero.stage < 3 or (world == 1 and not config.zero.offload_param.enabled)
    nothing = _core.DeviceRequest(weights_stay=stay, limit=limit, share=0.0)
    if problem is not None or (config.zero.offload_optimizer.enabled and not share):
        return nothing, None
    try:
        launcher = make_launcher(device)
    except DeviceError as error:
        if share:
            raise DeviceError(f"{_RATIO} = {config.zero.cpu_share:g} needs kernels on {device}: {error}") from error
        logger.warning("optimizer state stays in host memory, where the CPU updates it: %s", error)
        return nothing, None
    if share:
        return _core.DeviceRequest(weights_stay=stay, limit=limit, share=share), launcher
    room = _room(module, device) if limit is None else limit
    return _core.DeviceRequest(weights_stay=stay, limit=limit, room=room), launcher


def _why_not(config: Config, module: nn.Module, device: torch.device, world: int) -> str | None:
    """Why no state can be at home on the device; None where it can."""
    if is_host(device):
        return "the model computes in host memory, and the CPU updates all of it"
    if world > 1:
        return f"with several ranks, {world} here, the CPU updates all of the state"
    if config.zero.offload_param.enabled:
        return "parameters that leave the device (offload_param) are updated by the CPU"
    for name, each in module.named_modules():
        if isinstance(each, nn.Embedding | nn.EmbeddingBag) and each.sparse:
            return f"gradients of {name or 'the model'} are sparse, and only the CPU adds up rows"
    return None


def _room(module: nn.Module, device: torch.device) -> int:
    """Bytes that the engine may fill where nobody says: what is free, the model's own parameters among it, but for what
    is left to activations."""
    free, total = device_room(device)
    own = sum(param.nbytes for param in module.parameters() if param.device == device)
    return max(0, free + own - total // LEFT_TO_ACTIVATIONS)

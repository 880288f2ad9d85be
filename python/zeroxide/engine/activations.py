"""What keeps activations in host memory while a model computes on a device."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import torch
from torch import nn

from zeroxide.config import Config
from zeroxide.device.host_pool import HostPool
from zeroxide.device.placement import is_host
from zeroxide.device.transfers import Transfers
from zeroxide.engine.peak import room_in_budget
from zeroxide.plan.home import Home
from zeroxide.plan.plan import Plan
from zeroxide.zero.saved_activations import SavedActivations

__all__ = ["idle_keys", "keep_activations"]


def idle_keys(plan: Plan, config: Config, device: torch.device) -> list[tuple[str, str]]:
    """Keys of the config that come to nothing with this plan on this device, each with the reason."""
    found = list(plan.quantisation.no_effect)
    if is_host(device) and config.activation_checkpointing.cpu_checkpointing:
        found.append(("activation_checkpointing.cpu_checkpointing", "the model computes in host memory"))
    if config.zeroxide.disks and Home.DISK not in (plan.weights, plan.state):
        found.append(("zeroxide.disks", "nothing of this model is at home on disk"))
    return found


def keep_activations(
    transfers: Transfers, module: nn.Module, config: Config, plan: Plan, made: ExitStack
) -> SavedActivations | None:
    """What keeps them where the config asks for it, undone by `made`; None where they stay on the device."""
    if not config.activation_checkpointing.cpu_checkpointing:
        return None
    own = config.zeroxide
    expected = plan.resident_before + plan.expected_peaks()["total"]
    pool = HostPool(
        lambda memory: transfers.register(memory, "activations"), partial(room_in_budget, own.host_memory, expected)
    )
    found = SavedActivations(transfers, pool, module.buffers, own.prefetch)
    # The device lets go of the memory first.
    made.callback(found.close)
    return found

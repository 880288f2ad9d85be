"""What keeps activations in host memory while they wait for their backward."""

from __future__ import annotations

from functools import partial

from torch import nn

from zeroxide.config import Config
from zeroxide.device.host_pool import HostPool
from zeroxide.device.transfers import Transfers
from zeroxide.engine.peak import room_in_budget
from zeroxide.plan.plan import Plan
from zeroxide.zero.saved_activations import SavedActivations

__all__ = ["keep_activations"]


def keep_activations(config: Config, plan: Plan, module: nn.Module, transfers: Transfers) -> SavedActivations | None:
    """What brings activations of a device to host memory and back; None where they stay where they are."""
    if not config.activation_checkpointing.cpu_checkpointing:
        return None
    own = config.zeroxide
    expected = plan.resident_before + plan.expected_peaks()["total"]
    pool = HostPool(
        lambda memory: transfers.register(memory, "activations"), partial(room_in_budget, own.host_memory, expected)
    )
    return SavedActivations(transfers, pool, module.buffers, own.prefetch)

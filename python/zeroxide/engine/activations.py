"""What keeps activations elsewhere than where the model computes: in host memory, or on disk."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import torch
from torch import nn

from zeroxide.config import Config
from zeroxide.device.host_pool import HostPool
from zeroxide.device.placement import is_host
from zeroxide.device.transfers import Transfers
from zeroxide.engine.accumulation import Counters
from zeroxide.engine.peak import Peak, room_in_budget
from zeroxide.plan.home import Home
from zeroxide.plan.plan import Plan
from zeroxide.zero.activation_file import ActivationFile
from zeroxide.zero.activations_on_disk import ActivationsOnDisk, Budget
from zeroxide.zero.saved_activations import SavedActivations
from zeroxide.zero.stowed_view import ActivationStore

__all__ = ["idle_keys", "keep_activations"]

ENGINES = {"auto": "auto", "io_uring": "uring", "threads": "threads"}
"""What the queue of files calls `zeroxide.io_engine`."""


def idle_keys(plan: Plan, config: Config, device: torch.device) -> list[tuple[str, str]]:
    """Keys of the config that come to nothing with this plan on this device, each with the reason."""
    found = list(plan.quantisation.no_effect)
    if is_host(device) and config.activation_checkpointing.cpu_checkpointing:
        found.append(("activation_checkpointing.cpu_checkpointing", "the model computes in host memory"))
    if config.zeroxide.disks and Home.DISK not in (plan.weights, plan.state):
        found.append(("zeroxide.disks", "nothing of this model is at home on disk"))
    return found


def keep_activations(
    transfers: Transfers | None,
    module: nn.Module,
    config: Config,
    plan: Plan,
    made: ExitStack,
    counters: Counters,
) -> ActivationStore | None:
    """What keeps them where the config asks for it, undone by `made`; None where they stay where they are. Raises
    StorageError where a directory cannot be used."""
    if transfers is None:
        return _on_disk(module, config, made, counters)
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


def _on_disk(module: nn.Module, config: Config, made: ExitStack, counters: Counters) -> ActivationStore | None:
    if config.activations.path is None:
        return None
    file = ActivationFile(
        config.activations.path,
        config.activations.buffers,
        config.activations.disk,
        ENGINES[config.zeroxide.io_engine],
        config.aio.queue_depth,
    )
    made.callback(file.close)
    room = _RoomAfterAStep(config.zeroxide.host_memory, counters)
    budget = Budget(room) if config.activations.home == "auto" else None
    found = ActivationsOnDisk(file, module.buffers, budget)
    made.callback(found.close)
    return found


class _RoomAfterAStep:
    """Says how many bytes a budget has for activations in memory: None before a step in which none were there."""

    def __init__(self, limit: int | None, counters: Counters) -> None:
        self._limit = limit
        self._counters = counters
        self._peak: Peak | None = None
        self._steps = 0

    def __call__(self) -> int | None:
        if self._peak is None:
            self._peak, self._steps = Peak(), self._counters.global_steps
        if self._counters.global_steps == self._steps:
            return None
        return room_in_budget(self._limit, self._peak.most(), 0)

"""What a process holds in memory beside the model that an engine is made for."""

from __future__ import annotations

from torch import nn

from zeroxide import _core
from zeroxide.device.placement import in_host_memory, storage_address
from zeroxide.precision.bits import why_not_bytes
from zeroxide.zero.init.slices import slice_of

__all__ = ["resident_without"]


def resident_without(module: nn.Module) -> int:
    """Resident bytes of the process less those of the model's parameters, which move into the core's buckets."""
    storages = {
        storage_address(param): param.untyped_storage().nbytes()
        for param in module.parameters()
        if in_host_memory(param) and param.numel() and why_not_bytes(param) is None
    }
    slices = (slice_of(param) for param in module.parameters())
    storages.update({-1 - at: each.nbytes for at, each in enumerate(slices) if each is not None})
    return max(0, _core.resident()["rss"] - sum(storages.values()))

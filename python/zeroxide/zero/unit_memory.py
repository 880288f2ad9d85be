"""Where a unit's parameters show their values: under the core's window, or in memory of a device beside it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from operator import gt
from typing import Protocol

import torch

from zeroxide import _core
from zeroxide.device.placement import HOST, address, addresses, in_host_memory, is_host, lies_within, view_of
from zeroxide.device.transfers import room_for
from zeroxide.plan.plan import UnitPlan
from zeroxide.precision.bits import tensor_of

__all__ = ["DeviceMemory", "UnitMemory", "WindowMemory", "make_memory"]

_NOTHING = torch.empty(0, dtype=torch.uint8, device=HOST)
_USES: Callable[[int], int] = torch._C._storage_Use_Count


class UnitMemory(Protocol):
    """The memory that the parameters of one unit are views of while they show their values."""

    views: list[torch.Tensor]
    """What each parameter shows, valid only while the unit is gathered."""

    def addresses(self) -> list[int]:
        """Where each view begins."""

    def contains(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor, strided, lies there."""

    def note_shown(self, lent: Collection[int] | None) -> None:
        """The parameters are views of the memory but for those at `lent` positions; with None, none is."""

    def drop(self) -> None:
        """The engine ends: memory that is not the core's goes."""

    def has_readers(self) -> bool:
        """Whether somebody beside the unit has views of it and may read them unannounced, which brings the values."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a parameter lies in its unit, in bytes."""

    start: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size


class WindowMemory:
    """The core's window: each view has a storage of its own, so that what saves tensors by it takes these elements
    alone."""

    def __init__(self, window: _core.Window | None, flat: torch.Tensor, places: list[_Place]) -> None:
        self.views = []
        for each in places:
            raw = view_of(window, torch.uint8, each.start, each.nbytes) if each.nbytes else _NOTHING
            self.views.append(tensor_of(raw, each.dtype, each.shape))
        self._addresses = addresses(self.views)
        self._storages = [view.untyped_storage() for view in self.views]
        self._storage_addresses = [storage._cdata for storage in self._storages]
        self._own_uses = [*map(_USES, self._storage_addresses)]
        self._first = address(flat)
        self._end = self._first + flat.nbytes

    def addresses(self) -> list[int]:
        """See `UnitMemory`: they never change."""
        return self._addresses

    def contains(self, tensor: torch.Tensor) -> bool:
        """See `UnitMemory`."""
        return lies_within(tensor, self._first, self._end)

    def note_shown(self, lent: Collection[int] | None) -> None:
        """See `UnitMemory`: each view is known by a storage of its own."""

    def drop(self) -> None:
        """See `UnitMemory`: a window goes with the core."""

    def has_readers(self) -> bool:
        """See `UnitMemory`: a read of what is not there faults, and is served."""
        return any(map(gt, map(_USES, self._storage_addresses), self._own_uses))


class DeviceMemory:
    """One storage on a device, laid out as the window, which has memory only while that is needed.

    It stays the same storage, so that views which autograd has saved are of the new memory, too. The device tells
    nobody of a read of memory that is not there: every use is announced.
    """

    def __init__(self, name: str, window: _core.Window | None, places: list[_Place], device: torch.device) -> None:
        self.window = view_of(window, torch.uint8) if window is not None else _NOTHING
        """The unit's bytes in host memory, readable while the core holds it."""
        self.places = places
        self.nbytes = self.window.nbytes
        with room_for(self.nbytes, name, device):
            self.flat = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        """The unit's bytes on the device."""
        self.storage = self.flat.untyped_storage()
        none = torch.empty(0, dtype=torch.uint8, device=device)
        self.views = [
            tensor_of(self.flat[each.start : each.start + each.nbytes] if each.nbytes else none, each.dtype, each.shape)
            for each in places
        ]
        self.storage.resize_(0)
        self.saved = 0
        """Tensors over the storage that autograd has saved; backward announces their use (`saved_tensors.py`)."""
        self.shown = 0
        """Parameters that are views of the storage now."""
        self._own_uses = _USES(self.storage._cdata)

    def is_viewed(self) -> bool:
        """Whether somebody has views of it whose use nobody will announce."""
        return _USES(self.storage._cdata) > self._own_uses + self.saved + self.shown

    def own_view(self, nbytes: int) -> torch.Tensor:
        """The first bytes, for as long as the unit lasts, for what is at home there with it: nobody's view."""
        self._own_uses += 1
        return self.flat[:nbytes]

    @property
    def is_empty(self) -> bool:
        """Whether the storage has no memory."""
        return self.storage.nbytes() == 0 and self.nbytes > 0

    def addresses(self) -> list[int]:
        """See `UnitMemory`: they change whenever the storage gets memory."""
        return addresses(self.views)

    def contains(self, tensor: torch.Tensor) -> bool:
        """See `UnitMemory`."""
        return not in_host_memory(tensor) and tensor.untyped_storage()._cdata == self.storage._cdata

    def note_shown(self, lent: Collection[int] | None) -> None:
        """See `UnitMemory`."""
        self.shown = 0
        if lent is not None:
            self.shown = sum(1 for at, place in enumerate(self.places) if place.nbytes and at not in lent)

    def drop(self) -> None:
        """See `UnitMemory`; where somebody has views it goes with the last of them."""
        if not self.is_viewed():
            self.storage.resize_(0)

    def has_readers(self) -> bool:
        """See `UnitMemory`: nobody can be served."""
        return False

    def host_bytes(self, position: int) -> torch.Tensor:
        """A parameter's bytes in host memory, flat, readable while the core holds the unit."""
        place = self.places[position]
        return self.window[place.start : place.start + place.nbytes]


def make_memory(
    index: int, plan: UnitPlan, core: _core.Offload, dtype: torch.dtype, flat: torch.Tensor, device: torch.device
) -> UnitMemory:
    """The memory of unit `index`, whose window holds words of `dtype`, for a model that computes on `device`."""
    places = [
        _Place(
            core.param_offset(index, at) * dtype.itemsize, entry.numel * entry.dtype.itemsize, entry.dtype, entry.shape
        )
        for at, entry in enumerate(plan.params)
    ]
    window = core.window(index)
    return WindowMemory(window, flat, places) if is_host(device) else DeviceMemory(plan.name, window, places, device)

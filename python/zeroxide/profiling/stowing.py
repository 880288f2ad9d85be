"""In a rehearsal: what autograd saves leaves memory, and comes back when backward asks for it.

The bytes are those of `zero/activations_on_disk.py`, which does it to tensors that have values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from zeroxide.profiling.outline import Outline

__all__ = ["Stowing"]


class _Stowed:
    """A storage that has been saved: its size, and what has come back of it, if anybody has that."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.nbytes = storage.nbytes()
        self.back: weakref.ref[torch.UntypedStorage] | None = None


@dataclass(frozen=True)
class _View:
    stowed: _Stowed
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class Stowing:
    """A context around forward: torch's hooks for saved tensors.

    stays: tensors that stay, weights among them. least: bytes of the smallest memory that leaves. note: told of memory
    that has come back.
    """

    def __init__(self, stays: Iterable[torch.Tensor], least: int, note: Callable[[torch.Tensor], Any]) -> None:
        self.nbytes = 0
        """Bytes of all that has left."""
        self._stays = {_form(each).untyped_storage()._cdata for each in stays}
        self._least = least
        self._note = note
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], weakref.ref[_Stowed]]] = {}
        """Storages by their address, which another may have when they are gone."""

    def hooks(self) -> Any:
        """The context."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if not isinstance(tensor, Outline):
            return tensor
        form = tensor.form
        storage = form.untyped_storage()
        key = storage._cdata
        if key in self._stays or storage.nbytes() < self._least:
            return tensor.detach()
        known = self._known.get(key)
        stowed = known[1]() if known is not None and known[0]() is storage else None
        if stowed is None:
            stowed = _Stowed(storage)
            self._known[key] = weakref.ref(storage), weakref.ref(stowed)
            self.nbytes += stowed.nbytes
        return _View(stowed, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: Any) -> torch.Tensor:
        if not isinstance(saved, _View):
            found: torch.Tensor = saved
            return found
        stowed = saved.stowed
        storage = None if stowed.back is None else stowed.back()
        if storage is None:
            storage = torch.UntypedStorage(stowed.nbytes, device="meta")  # type: ignore[no-untyped-call]
            stowed.back = weakref.ref(storage)
        # That is no operation of the model's.
        with _disable_current_modes():
            empty = torch.empty(0, dtype=saved.dtype, device="meta")
            outline = Outline(empty.set_(storage, saved.offset, saved.shape, saved.stride))
        self._note(outline)
        return outline


def _form(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.form if isinstance(tensor, Outline) else tensor

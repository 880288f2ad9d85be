"""A tensor that autograd has saved and that waits for its backward somewhere else, wherever that is."""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["ActivationStore", "Stowed", "StowedView", "count_of_changes"]


class Stowed(Protocol):
    """Memory that has been saved."""

    views: int
    """Saved tensors over it."""


class StowedView:
    """A tensor that autograd has saved, over memory that is kept. `offset` is in elements of that memory."""

    __slots__ = ("dtype", "offset", "shape", "stowed", "stride", "version", "versioned")

    def __init__(self, tensor: torch.Tensor, stowed: Stowed, first: int = 0) -> None:
        self.stowed = stowed
        self.shape, self.stride, self.offset = tensor.shape, tensor.stride(), tensor.storage_offset() - first
        self.dtype = tensor.dtype
        self.versioned, self.version = count_of_changes(tensor), tensor._version
        stowed.views += 1

    def __del__(self) -> None:
        self.stowed.views -= 1


class ActivationStore(Protocol):
    """What keeps activations of one engine from forward to backward."""

    def begin(self) -> None:
        """A forward begins."""

    def keep(self, tensor: torch.Tensor) -> StowedView | None:
        """What to save for the tensor, which is no weight; None if it is to stay as it is."""

    def bring(self, view: StowedView) -> torch.Tensor:
        """The tensor as it was saved."""

    def end_backward(self) -> None:
        """A backward has ended."""

    def close(self) -> None:
        """The engine ends."""

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that the store itself has."""


def count_of_changes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that has the other's version from now on, and nothing of its memory."""
    found = tensor.detach()
    found.data = tensor.new_empty(0)
    return found

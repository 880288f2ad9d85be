"""Tensors in host memory that the operating system does not move or swap out, at addresses that disks write to."""

from __future__ import annotations

import ctypes
import os
import resource

import torch

from zeroxide.device.placement import address, fresh_pages
from zeroxide.errors import BudgetError, ModelError

__all__ = ["LockedTensors"]


class LockedTensors:
    """Those of one handle. A tensor is locked until it is freed, or the handle is gone and nobody has the tensor."""

    def __init__(self) -> None:
        self._held: dict[int, torch.Tensor] = {}
        """Tensors that nobody has freed, by address."""

    def new(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of shape (elements,) of zeros, at the start of a page. Raises BudgetError where the process may not
        lock as much, ModelError for no elements."""
        if elements <= 0:
            raise ModelError(f"new_cpu_locked_tensor: expected a number of elements above 0, got {elements}")
        nbytes = elements * dtype.itemsize
        try:
            memory = fresh_pages(nbytes)
            _lock(memory)
        except (OSError, OverflowError) as refused:
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            shown = "any number" if limit == resource.RLIM_INFINITY else limit
            reason = getattr(refused, "strerror", None) or refused
            error = BudgetError(
                f"new_cpu_locked_tensor: {nbytes} bytes cannot be locked ({reason}): a process may lock {shown} here "
                "(ulimit -l), as far as there is memory"
            )
            error.need, error.limit = nbytes, None if limit == resource.RLIM_INFINITY else limit
            raise error from None
        # The lock goes with the pages.
        tensor = memory.view(dtype)
        self._held[address(tensor)] = tensor
        return tensor

    def free(self, tensor: torch.Tensor) -> bool:
        """Lets go of a tensor; whether it was one of these. Its memory goes when nobody else has it."""
        return self._held.pop(address(tensor), None) is not None

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies in one of these as a whole."""
        start, nbytes = address(tensor), tensor.numel() * tensor.element_size()
        return any(
            first <= start and start + nbytes <= first + each.numel() * each.element_size()
            for first, each in self._held.items()
        )


def _lock(memory: torch.Tensor) -> None:
    """Locks pages, until they go. Raises OSError."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.mlock(ctypes.c_void_p(address(memory)), ctypes.c_size_t(memory.numel())) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

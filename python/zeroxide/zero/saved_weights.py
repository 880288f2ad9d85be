"""Weights on a device that autograd saves in forward: backward brings them back before it reads them.

Backward reads what forward has saved, by operations that no module announces, too. In host memory such a read faults
and is served; a device would read memory that is another's by then. So forward runs with hooks of torch's for saved
tensors: a weight is saved as what it is, and its unit is used when it is asked for.

With such hooks torch does not look whether a saved tensor has been changed in place since. They do it instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from zeroxide.zero.gather.device_weights import memory_of
from zeroxide.zero.unit import Unit

__all__ = ["SavedWeights"]

_Hook = Callable[[Any], Any]


class _Saved:
    """A tensor as it was saved, and its version then."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        # Not the tensor itself, which may be an output that refers to the node that saves it.
        self.tensor = tensor.detach()
        self.version = tensor._version


class _SavedWeight(_Saved):
    """A view of a unit's weights."""

    __slots__ = ("memory", "unit")

    def __init__(self, tensor: torch.Tensor, unit: Unit) -> None:
        super().__init__(tensor)
        self.unit = unit
        self.memory = memory_of(unit)
        self.memory.saved += 1

    def __del__(self) -> None:
        self.memory.saved -= 1


class SavedWeights:
    """The hooks of one model, in force from `begin` to `end` on the thread that runs forward.

    use: gathers units that an operation needs.
    """

    def __init__(self, units: Iterable[Unit], use: Callable[[Sequence[Unit]], None]) -> None:
        self._units = {memory_of(unit).storage._cdata: unit for unit in units}
        self._use = use
        self._active = False
        self._others: tuple[_Hook, _Hook] | None = None
        """Hooks of the caller's, which tensors that are no weights go to."""

    def begin(self) -> None:
        """A forward begins. Idempotent."""
        if not self._active:
            self._others = torch._C._autograd._top_saved_tensors_default_hooks(True)
            torch._C._autograd._push_saved_tensors_default_hooks(self._pack, self._unpack)
            self._active = True

    def end(self) -> None:
        """It has ended. Idempotent."""
        if self._active:
            torch._C._autograd._pop_saved_tensors_default_hooks()
            self._active, self._others = False, None

    def _pack(self, tensor: torch.Tensor) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            unit = None
            if tensor.layout is torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                unit = self._units.get(tensor.untyped_storage()._cdata)
            if unit is None and self._others is not None:
                pack, unpack = self._others
                return unpack, pack(tensor)
            return _Saved(tensor) if unit is None else _SavedWeight(tensor, unit)

    def _unpack(self, saved: Any) -> torch.Tensor:
        if isinstance(saved, tuple):
            unpack, packed = saved
            found: torch.Tensor = unpack(packed)
            return found
        tensor: torch.Tensor = saved.tensor
        if tensor._version != saved.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device} is at version {tensor._version}, and was "
                f"saved at version {saved.version}"
            )
        if isinstance(saved, _SavedWeight):
            self._use([saved.unit])
        return tensor

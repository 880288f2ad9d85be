"""What autograd saves in forward, and backward asks for again: one pair of torch's hooks for all of it.

Backward reads what forward has saved, by operations that no module announces, too. In host memory a read of a weight
that is not there faults and is served; a device would read memory that is another's by then. So a weight is saved as
what it is, and its unit is used when it is asked for. Activations of a device may wait in host memory
(`saved_activations.py`), those in host memory on disk (`activations_on_disk.py`): without either the hooks are a
device's alone.

With such hooks torch does not look whether a saved tensor has been changed in place since. They do it instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from zeroxide.zero.gather.device_weights import memory_of
from zeroxide.zero.stowed_view import ActivationStore, StowedView
from zeroxide.zero.unit import Unit

__all__ = ["SavedTensors"]

_Hook = Callable[[Any], Any]


class _Saved:
    """A tensor as it was saved, and its version then."""

    __slots__ = ("version", "versioned")

    def __init__(self, tensor: torch.Tensor) -> None:
        # Not the tensor itself, which may be an output that refers to the node that saves it.
        self.versioned = tensor.detach()
        self.version = tensor._version

    @property
    def shape(self) -> torch.Size:
        return self.versioned.shape


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


class _Here(threading.local):
    """What is known of the thread: torch has hooks of each apart."""

    def __init__(self) -> None:
        self.active = False
        self.others: tuple[_Hook, _Hook] | None = None
        """Hooks of the caller's, which tensors that are no weights go to."""


class SavedTensors:
    """The hooks of one model, in force from `begin` to `end` on the thread that runs forward.

    use: gathers units that an operation needs; None where the device has all weights at all times.
    """

    def __init__(
        self,
        units: Iterable[Unit],
        use: Callable[[Sequence[Unit]], None] | None,
        activations: ActivationStore | None = None,
    ) -> None:
        self._units = {memory_of(unit).storage._cdata: unit for unit in units}
        self._use = use
        self.activations = activations
        """What keeps them elsewhere; None where they stay where they are."""
        self._here = _Here()

    def begin(self) -> None:
        """A forward begins. Idempotent."""
        here = self._here
        if not here.active:
            here.others = torch._C._autograd._top_saved_tensors_default_hooks(True)
            torch._C._autograd._push_saved_tensors_default_hooks(self._pack, self._unpack)
            here.active = True
            if self.activations is not None:
                self.activations.begin()

    def end(self) -> None:
        """It has ended. Idempotent."""
        here = self._here
        if here.active:
            torch._C._autograd._pop_saved_tensors_default_hooks()
            here.active, here.others = False, None

    def end_backward(self) -> None:
        """A backward has ended, and its graph may be gone."""
        if self.activations is not None:
            self.activations.end_backward()

    def _pack(self, tensor: torch.Tensor) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            plain = tensor.layout is torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            unit = self._units.get(tensor.untyped_storage()._cdata) if plain else None
            if unit is not None:
                return _Saved(tensor) if self._use is None else _SavedWeight(tensor, unit)
            if self._here.others is not None:
                pack, unpack = self._here.others
                return unpack, pack(tensor)
            kept = self.activations.keep(tensor) if plain and self.activations is not None else None
            return _Saved(tensor) if kept is None else kept

    def _unpack(self, saved: Any) -> torch.Tensor:
        if isinstance(saved, tuple):
            unpack, packed = saved
            found: torch.Tensor = unpack(packed)
            return found
        tensor: torch.Tensor = saved.versioned
        if tensor._version != saved.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{tensor.dtype} {tuple(saved.shape)} on {tensor.device} is at version {tensor._version}, and was "
                f"saved at version {saved.version}"
            )
        if isinstance(saved, StowedView):
            assert self.activations is not None, "it keeps what it has made"
            return self.activations.bring(saved)
        if isinstance(saved, _SavedWeight):
            assert self._use is not None, "weights are brought where they come and go"
            self._use([saved.unit])
        return tensor

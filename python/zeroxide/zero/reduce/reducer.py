"""Gradients from autograd into the core, each as soon as it is complete."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

from zeroxide import _core
from zeroxide.device.placement import plain, spec
from zeroxide.errors import ModelError
from zeroxide.zero.hook_handle import Hook
from zeroxide.zero.on_device.core import host_part
from zeroxide.zero.passes import GradientState
from zeroxide.zero.reduce.large_weights import LargeWeights, accumulate_rows, raise_closed
from zeroxide.zero.reduce.offload import GradientOffload
from zeroxide.zero.unit import Unit

if TYPE_CHECKING:
    from zeroxide.zero.reduce.in_order import GradientOrder

__all__ = ["Reducer"]

_HOOKS = attrgetter("_post_accumulate_grad_hooks")


class Reducer:
    """Hooks on every trainable parameter. `complete` hears of units whose gradients have all been accumulated, `begin`
    of a backward's first gradient, before it is accumulated."""

    def __init__(
        self,
        core: _core.Offload,
        units: list[Unit],
        begin: Callable[[], None],
        complete: Callable[[Unit], None],
        note_repeated: Callable[[Unit], None],
        is_training: Callable[[], bool],
        grad_dtype: torch.dtype,
        grad_offload: GradientOffload | None = None,
    ) -> None:
        self.core = core
        self.grad_offload = grad_offload
        """What brings gradients down from a device; None where they are in host memory."""
        self.begin = begin
        self.complete = complete
        self.divisor = 1
        """What gradients are divided by as they are accumulated: the accumulation steps, where no loss was divided by
        them."""
        self.order: GradientOrder | None = None
        """What lets gradients through in the order of micro-batches, several of which are under way."""
        self.wanted: list[frozenset[int]] = []
        """Of each unit, the positions that take a gradient."""
        self.missing: list[set[int]] = []
        """Those of them whose gradients are outstanding in the backward under way."""
        self.handles: list[RemovableHandle] = []
        self.hooked: list[tuple[torch.Tensor, Callable[[torch.Tensor], None]]] = []
        self._places: list[tuple[Unit, int]] = []
        for unit in units:
            wanted = frozenset(position for position, trainable in enumerate(unit.trainable) if trainable)
            missing = set(wanted)
            self.wanted.append(wanted)
            self.missing.append(missing)
            for position in sorted(wanted):
                hook = Hook(_core.GradientHook(host_part(core), unit, position, missing, GradientState.OPEN, self))
                self.hooked.append((unit.params[position], hook))
                self._places.append((unit, position))
                self.handles.append(_put(*self.hooked[-1]))
        self.params = [param for param, _ in self.hooked]
        """All trainable parameters."""
        self.units = units
        # On a device a gradient leaves at once, and its parts would leave in more pieces.
        self.large = LargeWeights(units if grad_offload is None else (), self, note_repeated, is_training, grad_dtype)

    def stay_last(self) -> None:
        """Hooks of users that came later must find a gradient: takes it after them."""
        if max(map(len, map(_HOOKS, self.params)), default=0) <= 1:
            return
        for number, (param, hook) in enumerate(self.hooked):
            hooks = param._post_accumulate_grad_hooks
            if len(hooks) > 1 and next(reversed(hooks)) != self.handles[number].id:
                self.handles[number].remove()
                self.handles[number] = _put(param, hook)

    def put_before(self, make: Callable[[Callable[[torch.Tensor], None], Unit, int], Callable[[Any], None]]) -> None:
        """Puts what `make` makes of each hook, its unit and position in the hook's place."""
        for number, (param, hook) in enumerate(self.hooked):
            self.handles[number].remove()
            self.hooked[number] = param, make(hook, *self._places[number])
            self.handles[number] = _put(*self.hooked[number])

    def expect(self, unit: Unit) -> None:
        """Gradients of the unit are outstanding, for one more micro-batch."""
        self.missing[unit.index] |= self.wanted[unit.index]

    def expect_all(self) -> None:
        """Begins a backward: every trainable parameter's gradient is outstanding."""
        for unit, wanted, missing in zip(self.units, self.wanted, self.missing, strict=True):
            missing |= wanted
            if unit.gradients is GradientState.IDLE:
                unit.gradients = GradientState.OPEN

    def end_backward(self) -> None:
        """No gradient is expected until the next backward begins."""
        for unit in self.units:
            if unit.gradients is GradientState.OPEN:
                unit.gradients = GradientState.IDLE
        self.large.end_backward()

    def is_complete(self, unit: Unit) -> bool:
        """Whether every gradient of the unit has been accumulated, and nothing in it is frozen: backward is done with
        it."""
        return not unit.has_frozen and not self.missing[unit.index]

    def check_open(self, unit: Unit) -> None:
        """Begins a backward unless one is under way. Raises ModelError when the unit's gradients have gone out."""
        self.begin()
        if unit.gradients is GradientState.SENT:
            raise_closed(unit)

    def accumulate_unusual(self, unit: Unit, position: int, grad: torch.Tensor) -> None:
        """Accumulates a gradient that the hook cannot give to the core as it is."""
        grad = self.share(grad)
        if grad.layout is torch.strided:
            if self.grad_offload is not None:
                self.grad_offload.take(unit, position, grad)
            else:
                self.core.accumulate(unit.index, position, 0, spec(plain(grad)), True)
        elif grad.layout is torch.sparse_coo and grad.sparse_dim() == 1 and grad.dim() == 2:
            if self.grad_offload is not None and self.grad_offload.keeps(unit):
                raise ModelError(
                    f"the gradient of {unit.names[position]} is sparse, and its optimizer state is on the device, "
                    "which takes dense ones: use Embedding(sparse=False), or let the CPU update it "
                    '(zero_optimization.offload_optimizer.device "cpu")',
                    name=unit.names[position],
                )
            # What was taken of the parameter before comes first in its sum.
            self.drain()
            accumulate_rows(self.core, unit, position, grad)
        else:
            raise ModelError(
                f"the gradient of {unit.names[position]} has layout {grad.layout}: expected dense, or rows of a matrix",
                name=unit.names[position],
            )

    def drain(self) -> None:
        """Every gradient that has been taken is in the core."""
        if self.grad_offload is not None:
            self.grad_offload.drain()

    def share(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient divided by `divisor`: the same bits as of a divided loss where that is a power of two."""
        if self.divisor == 1:
            return grad
        if grad.layout is torch.sparse_coo:
            # Not as a whole, which may sum rows that were looked up twice in another order.
            parts = grad._indices(), grad._values() / self.divisor
            return torch.sparse_coo_tensor(*parts, grad.shape, check_invariants=False)
        return grad / self.divisor

    def arrived(self, unit: Unit, position: int) -> None:
        """Notes that a parameter's gradient has been accumulated, which came in parts."""
        missing = self.missing[unit.index]
        if position in missing:
            missing.discard(position)
            if not missing:
                self.complete(unit)

    def close(self) -> None:
        """Removes all hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.hooked.clear()
        self.params.clear()
        self.large.close()


def _put(param: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> RemovableHandle:
    handle: RemovableHandle = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return handle

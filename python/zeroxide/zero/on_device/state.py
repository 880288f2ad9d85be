"""All units that are at home on the device: their gradients as autograd gives them, the norm of these, and the update.

Kernels run on the stream that the caller computes on, where gradients come from and weights are used next, so that
nothing there has to wait. What another stream did before is waited for. The core keeps the books: which parameters have
had a gradient, the norm over all of them, updates and groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from zeroxide import _core
from zeroxide.device.health import DeviceHealth
from zeroxide.device.placement import current, in_host
from zeroxide.device.transfers import Transfers
from zeroxide.kernels import Launcher
from zeroxide.kernels.accumulate import accumulate
from zeroxide.kernels.norm import sums_of_squares
from zeroxide.kernels.update import Step, update
from zeroxide.plan.plan import Plan
from zeroxide.zero.on_device.unit import UnitOnDevice
from zeroxide.zero.unit import Unit

__all__ = ["StateOnDevice"]


class StateOnDevice:
    """What the device has and updates, by the numbers of units."""

    def __init__(
        self, core: _core.Offload, plan: Plan, units: Sequence[Unit], launcher: Launcher, health: DeviceHealth
    ) -> None:
        self.health = health
        self.units = {
            unit.index: UnitOnDevice(unit, plan, core) for unit in units if unit.index in plan.units_on_device
        }
        self._core = core
        self._launcher = launcher
        self._transfers: Transfers | None = None
        self._told: Callable[[Iterable[int]], None] = lambda units: None
        self._unmeasured: set[tuple[int, int]] = set()
        """(unit, position) of gradients that have changed since their norm was last taken."""
        self._stream: torch.Stream | None = None

    def connect(self, transfers: Transfers, told: Callable[[Iterable[int]], None]) -> None:
        """`told` hears of units whose weights are other ones for what the caller's stream is given next."""
        self._transfers, self._told = transfers, told

    def follow(self) -> None:
        """What the caller's stream is given next comes after all that was done with the state before. Raises what the
        core raises where a step has failed half way, on either side, and DeviceError where the device is lost."""
        self._core.check_usable()
        self.health.check()
        if self._transfers is None:
            # While the engine is made, everything is on one stream.
            return
        stream = self._transfers.stream()
        if self._stream is not None and stream != self._stream:
            with self.health.doing("streams waited for one another"):
                stream.wait_stream(self._stream)
        self._stream = stream

    def changed(self, units: Iterable[int]) -> None:
        """The weights of units were changed by what the caller's stream was given last."""
        self._told(units)

    # Gradients ------------------------------------------------------------------------------------------------------

    def take(self, unit: int, position: int, grad: torch.Tensor) -> None:
        """Stores a gradient, flat and contiguous on the device, or adds it to what has come since the last step."""
        self.follow()
        add = self._core.note_gradient(unit, position)
        self._unmeasured.add((unit, position))
        state = self.units[unit]
        with current(self.health.device), self.health.doing(f"gradients of {state.name} were added up"):
            accumulate(self._launcher, state.grad[state.place(position)], grad, add=add)

    def write_gradient(self, unit: int, position: int, start: int, values: torch.Tensor) -> None:
        """Replaces elements of a gradient; where there was none, the others are zero."""
        state = self.units[unit]
        if not self._core.note_gradient(unit, position):
            state.grad[state.place(position)].zero_()
        self._unmeasured.add((unit, position))
        state.write("grad", state.place(position, start, values.numel()), values)

    def forget_gradients(self) -> None:
        """No gradient counts any more."""
        self._unmeasured.clear()

    def measure(self) -> None:
        """Tells the core the norm of each gradient that has changed since it was told last. The host waits for them."""
        if not self._unmeasured:
            return
        self.follow()
        found = sorted(self._unmeasured)
        measured = [(unit, at) for unit, at in found if self.units[unit].numels[at]]
        sums: list[float] = []
        if measured:
            tensors = [self.units[unit].grad[self.units[unit].place(at)] for unit, at in measured]
            # One small copy, which no result waits for longer than for the gradients themselves.
            with current(self.health.device), self.health.doing("the norm of gradients was taken"):
                sums = in_host(sums_of_squares(self._launcher, tensors)).tolist()
        of_each = dict(zip(measured, sums, strict=True))
        for unit, at in found:
            total = of_each.get((unit, at), 0.0)
            self._core.note_norm(unit, at, total, total != total or total == float("inf"))
        self._unmeasured.clear()

    # The update -----------------------------------------------------------------------------------------------------

    def step(self, groups: list[_core.Rule], grad_scale: float) -> None:
        """Updates every unit that has had a gradient, and then all that is the core's: the device works meanwhile.

        Once the first of them has begun, an error is what every later call of either side says.
        """
        self.follow()
        runs = {unit: self._core.away_runs(unit, groups) for unit in self.units}
        begun = False
        steps: dict[tuple[int, int], Step] = {}
        try:
            for unit, of_unit in runs.items():
                for start, count, group, updates, stream in of_unit:
                    step = steps.get((group, updates))
                    if step is None:
                        rule = groups[group]
                        assert rule.rule is not None, "groups hold rules, not their base"
                        step = steps[group, updates] = Step(rule.rule, rule.values, updates + 1, grad_scale)
                    begun = True
                    self._update(self.units[unit], slice(start, start + count), step, stream)
            self.changed([unit for unit, of_unit in runs.items() if of_unit])
            self._core.step(groups, grad_scale)
        except BaseException as error:
            if begun:
                self._core.fail_step(str(error) or type(error).__name__, False)
            raise
        self._unmeasured.clear()

    def _update(self, state: UnitOnDevice, where: slice, step: Step, stream: int) -> None:
        with current(self.health.device), self.health.doing(f"{state.name} was updated"):
            update(self._launcher, step, state.format, state.parts(where), state.grad[where], stream)

    # Bytes ----------------------------------------------------------------------------------------------------------

    def nbytes(self) -> dict[str, int]:
        """Bytes on the device, by bucket."""
        found = {"weights": 0, "gradients": 0, "optimizer": 0}
        for state in self.units.values():
            for name, size in state.nbytes.items():
                found[name] += size
        return found

    def close(self) -> None:
        """Gives state and gradients back; weights go with their unit. Idempotent."""
        self.units.clear()

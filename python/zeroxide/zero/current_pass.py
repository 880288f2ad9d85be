"""What is known of a pass while it lasts, and of the forwards that a backward is still to come for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zeroxide.zero.nested import Given
from zeroxide.zero.passes import PassState, UsesState
from zeroxide.zero.unit import Unit

__all__ = ["Pass", "Uses"]

_BEFORE = {
    PassState.IDLE: (),
    PassState.FORWARD: (PassState.IDLE,),
    PassState.BACKWARD: (PassState.IDLE, PassState.FORWARD),
}


@dataclass(slots=True, eq=False)
class Pass:
    """What is known of one pass, and ends with it."""

    state: PassState = PassState.IDLE
    depth: int = 0
    """Calls of the whole model under way, those that recompute among them."""
    inputs: list[Given] = field(default_factory=list)
    """Of every module under way that uses a unit, the outermost first."""
    lingering: Unit | None = None
    """A unit of several modules, one of which has run: in use until another unit's turn comes."""
    held: list[Unit] = field(default_factory=list)
    """Units whose turn in backward it is."""
    leaves: list[Unit] = field(default_factory=list)
    """Units of leaf modules whose turn in backward has come, and whose gradients have not been sent."""

    def become(self, state: PassState) -> None:
        """Begins."""
        assert self.state in _BEFORE[state], f"{state} does not follow {self.state}"
        self.state = state

    @property
    def under_way(self) -> bool:
        """Whether the model or a part of it runs forward, or backward has begun."""
        return self.state is PassState.BACKWARD or self.depth > 0 or bool(self.inputs)


@dataclass(slots=True, eq=False)
class Uses:
    """Uses of units by the forwards that one backward is for: several of them count together."""

    state: UsesState = UsesState.NONE
    ran: set[tuple[int, int]] = field(default_factory=set)
    """(unit, module) of every module that has run."""
    repeated: set[int] = field(default_factory=set)
    """Units whose gradients may come more than once, since a module ran twice."""
    accumulators: list[Any] = field(default_factory=list)
    """Nodes that autograd must not make itself, since it would make them for an empty parameter."""

    def note(self, unit: Unit, module: object) -> None:
        """Notes that a module of the unit runs, for the first time or again."""
        key = (unit.index, id(module))
        if key in self.ran:
            self.repeated.add(unit.index)
        self.ran.add(key)

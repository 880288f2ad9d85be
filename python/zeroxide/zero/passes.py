"""The states that units, gradients and passes can be in."""

from __future__ import annotations

from enum import Enum, auto

import torch

__all__ = ["GradientState", "PassState", "UnitState", "UsesState", "in_backward"]


class UnitState(Enum):
    """Whether a unit's parameters can be used.

    RELEASED: each parameter is an empty tensor; the bytes are wherever the core keeps them.
    GATHERED: each parameter is a view of the unit's flat weights, and the core holds the memory under them.
    OUTLINED: each parameter is such a view, too, and may have no memory: it is as empty as a released one to whoever
    uses it, and has its shape. In backward, on a device that has weights only while they are used.
    """

    RELEASED = auto()
    GATHERED = auto()
    OUTLINED = auto()


class GradientState(Enum):
    """Whether gradients of a unit may arrive.

    IDLE: none is expected. To OPEN when a backward begins, at the latest with the first gradient of any unit.
    OPEN: they are accumulated as they come. To SENT when the unit's part of a backward is complete, on several ranks;
    else to IDLE when the backward ends.
    SENT: they are on their way to the ranks that update with them, and none may come. To IDLE when all ranks have
    reduced every unit of the backward.
    """

    IDLE = auto()
    OPEN = auto()
    SENT = auto()


class PassState(Enum):
    """What the model does.

    IDLE: no pass of the whole model is under way, though parts of it may run by themselves.
    FORWARD: from the model's first call to its return. From IDLE.
    BACKWARD: from the first gradient that is known, or `engine.backward`, to the end of autograd's pass. From IDLE, or
    from FORWARD where that asks for gradients itself; recomputation is part of it.

    A pass that ends is followed by a new one that is IDLE.
    """

    IDLE = auto()
    FORWARD = auto()
    BACKWARD = auto()


class UsesState(Enum):
    """Whether a backward is still to come for the forwards that `Uses` has seen.

    NONE: there was no forward with gradients. To PENDING with the first one.
    PENDING: the backward is still to come, or to end. To ENDED when it does.
    ENDED: what is known holds for another backward through the same graph. The next forward begins anew.
    """

    NONE = auto()
    PENDING = auto()
    ENDED = auto()


def in_backward() -> bool:
    """Whether this thread is inside an autograd backward pass."""
    return torch._C._current_graph_task_id() != -1

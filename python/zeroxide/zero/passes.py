"""The states that units and passes can be in."""

from __future__ import annotations

from enum import Enum, auto

import torch

__all__ = ["UnitState", "in_backward"]


class UnitState(Enum):
    """Whether a unit's parameters can be used.

    RELEASED: each parameter is an empty tensor; the bytes are wherever the core keeps them.
    GATHERED: each parameter is a view of the unit's flat weights, and the core holds the memory under them.
    """

    RELEASED = auto()
    GATHERED = auto()


def in_backward() -> bool:
    """Whether this thread is inside an autograd backward pass."""
    return torch._C._current_graph_task_id() != -1

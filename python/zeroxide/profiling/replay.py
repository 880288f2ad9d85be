"""How long an operation takes on this machine: it is run again by itself, with arguments of the same forms."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from zeroxide.device.placement import HOST
from zeroxide.profiling.rehearsal import Operation, TensorForm

__all__ = ["replay"]

_SECONDS = 0.03
"""For about so long an operation is run again, three times at least."""
_RUNS = 50
_FILL = 0.01
"""What floats are: no product of it is subnormal, which some processors are slow with."""
_SPREAD = 48 << 20
"""Bytes of arguments that runs go through in turn, so that most come from memory, as weights do in a step."""


def replay(operation: Operation) -> float:
    """Seconds of the fastest run: what else the machine does only ever adds to one. Takes about 30 ms, or three runs
    where those are longer.

    Raises RuntimeError where the operation cannot be run with arguments of zeros and constants.
    """
    sets = max(1, min(4, _SPREAD // max(1, operation.nbytes)))
    arguments = [_arguments(operation) for _ in range(sets)]
    taken: list[float] = []
    with torch.no_grad():
        operation.func(*arguments[0][0], **arguments[0][1])
        end = time.perf_counter() + _SECONDS
        while len(taken) < 3 or (time.perf_counter() < end and len(taken) < _RUNS):
            args, kwargs = arguments[len(taken) % sets]
            begun = time.perf_counter()
            operation.func(*args, **kwargs)
            taken.append(time.perf_counter() - begun)
    return min(taken)


def _arguments(operation: Operation) -> Any:
    """New tensors of the operation's forms; forms that are equal share one, as `x * x` has it."""
    made: dict[TensorForm, torch.Tensor] = {}

    def make(form: TensorForm) -> torch.Tensor:
        if form not in made:
            made[form] = _tensor(form)
        return made[form]

    forms = (operation.args, operation.kwargs)
    first = next((each for each in tree_leaves(forms) if isinstance(each, TensorForm)), None)
    # What is written to must not be an argument beside.
    if first is not None and operation.name.split(".")[1].endswith("_"):
        written = _tensor(first)
        args = (written, *tree_map_only(TensorForm, make, operation.args[1:]))
        return args, tree_map_only(TensorForm, make, operation.kwargs)
    return tree_map_only(TensorForm, make, forms)


def _tensor(form: TensorForm) -> torch.Tensor:
    elements = form.nbytes // form.dtype.itemsize
    whole = torch.empty(elements, dtype=form.dtype, device=HOST)
    whole.fill_(_FILL if form.dtype.is_floating_point else 0)
    return whole.as_strided(form.shape, form.stride)

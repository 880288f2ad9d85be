"""The states of the process's random number generators (torch on the CPU, Python, numpy), as JSON can hold them."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch

__all__ = ["check", "read", "restore"]


def read() -> dict[str, Any]:
    """The present states."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        "python": [version, list(internal), gauss],
        "numpy": [kind, base64.b64encode(keys.astype("<u4").tobytes()).decode(), position, has_gauss, cached],
    }


def check(states: dict[str, Any]) -> None:
    """Raises ValueError or TypeError if `restore` would. Changes nothing that stays."""
    before = read()
    try:
        restore(states)
    finally:
        restore(before)


def restore(states: dict[str, Any]) -> None:
    """Goes back to `states`. Raises ValueError, TypeError, KeyError or RuntimeError if they are not what `read` gave."""
    version, internal, gauss = states["python"]
    kind, keys, position, has_gauss, cached = states["numpy"]
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(states["torch"])), dtype=torch.uint8))
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state((kind, np.frombuffer(base64.b64decode(keys), dtype="<u4"), position, has_gauss, cached))

"""The states of the process's random number generators (torch on the CPU, Python, numpy), as JSON can hold them."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch

from zeroxide.device.placement import of_buffer

__all__ = ["check", "read", "restore"]

NUMPY_KIND = "MT19937"
"""What numpy.random uses unless a program replaces it; another generator is left out."""


def read() -> dict[str, Any]:
    """The present states."""
    version, words, gauss = random.getstate()
    found = np.random.get_state(legacy=False)
    numpy_state = None
    if found["bit_generator"] == NUMPY_KIND:
        numpy_state = [
            _text(found["state"]["key"]),
            int(found["state"]["pos"]),
            int(found["has_gauss"]),
            float(found["gauss"]),
        ]
    return {
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        "python": [version, _text(np.array(words)), gauss],
        "numpy": numpy_state,
    }


def check(states: dict[str, Any]) -> None:
    """Raises what `restore` would. Changes nothing that stays."""
    before = read()
    try:
        restore(states)
    finally:
        restore(before)


def restore(states: dict[str, Any]) -> None:
    """Goes back to `states`; raises ValueError, TypeError, KeyError or RuntimeError if `read` never gives them."""
    version, words, gauss = states["python"]
    torch.set_rng_state(of_buffer(bytearray(base64.b64decode(states["torch"])), torch.uint8))
    random.setstate((version, tuple(_words(words).tolist()), gauss))
    if states["numpy"] is not None:
        keys, position, has_gauss, cached = states["numpy"]
        np.random.set_state((NUMPY_KIND, _words(keys), position, has_gauss, cached))


def _text(words: np.ndarray[Any, Any]) -> str:
    """32-bit words, little-endian, in base64."""
    return base64.b64encode(words.astype("<u4").tobytes()).decode()


def _words(text: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(text), dtype="<u4")

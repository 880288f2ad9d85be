"""All ways of using weights that are not the usual one, by name."""

from __future__ import annotations

import weight_uses_autograd
import weight_uses_called
import weight_uses_kept
import weight_uses_odd
import weight_uses_read
import weight_uses_torch
from stacks import WAYS

__all__ = [
    "WAYS",
    "weight_uses_autograd",
    "weight_uses_called",
    "weight_uses_kept",
    "weight_uses_odd",
    "weight_uses_read",
    "weight_uses_torch",
]

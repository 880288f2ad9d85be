"""All ways of using weights that are not the usual one, by name."""

from __future__ import annotations

import ways_autograd
import ways_called
import ways_kept
import ways_odd
import ways_read
import ways_torch
from stacks import WAYS

__all__ = ["WAYS", "ways_autograd", "ways_called", "ways_kept", "ways_odd", "ways_read", "ways_torch"]

"""The names of the formats in which optimizer state is kept."""

from __future__ import annotations

from typing import Literal

__all__ = ["EXACT", "FORMATS", "Format"]

Format = Literal["split", "fp32", "split-bf16", "compact"]
FORMATS: tuple[Format, ...] = ("split", "fp32", "split-bf16", "compact")
"""All but "fp32" need bf16 weights; the last two round what a rule remembers, at random."""
EXACT: tuple[Format, ...] = ("split", "fp32")
"""Those with the bits of fp32 state."""

"""The names of the formats in which optimizer state is kept."""

from __future__ import annotations

from typing import Literal

__all__ = ["EXACT", "FORMATS", "Format", "needs_bf16"]

Format = Literal["split", "fp32", "split-bf16", "compact"]
FORMATS: tuple[Format, ...] = ("split", "fp32", "split-bf16", "compact")
"""All but "fp32" need bf16 weights; the last two round what a rule remembers, at random."""
EXACT: tuple[Format, ...] = ("split", "fp32")
"""Those with the bits of fp32 state."""


def needs_bf16(format: str) -> str:
    """Why a format other than "fp32" goes with bf16 weights alone, for messages."""
    kept = "a bf16 half and 8 bits of the other" if format == "compact" else "two bf16 halves"
    return f'"{format}" keeps a weight as {kept} and needs bf16.enabled'

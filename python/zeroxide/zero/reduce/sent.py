"""Gradients that leave this rank, counted in bytes: for what, and whether they leave the rank's shard group."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Sent", "SentGradients"]


@dataclass(slots=True)
class Sent:
    """Bytes that left this rank, apart by whether they stayed within its shard group."""

    within: int = 0
    across: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.within + self.across


@dataclass(slots=True)
class SentGradients:
    """Bytes of gradients that left this rank since the start."""

    reductions: Sent = field(default_factory=Sent)
    """Gradients on their way to the ranks that sum them."""
    updates: Sent = field(default_factory=Sent)
    """Sums on their way to the other replicas of a shard, which update it with them."""

    @property
    def total(self) -> int:
        """All bytes."""
        return self.reductions.total + self.updates.total

    @property
    def across(self) -> int:
        """Bytes that left the shard group."""
        return self.reductions.across + self.updates.across

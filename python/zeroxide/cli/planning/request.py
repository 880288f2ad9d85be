"""What is asked of a plan, and the ways of training that come into question."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["OFFLOADS", "OnPaper", "Option", "Request"]

OFFLOADS = ("none", "cpu", "mixed", "nvme")
"""From everything where the model computes to everything on disk; `mixed` has weights in host memory and state on
disk."""


@dataclass(frozen=True)
class OnPaper:
    """A device that need not be here."""

    memory: int
    """Bytes."""
    flops: float
    """A second, of what a training step reaches."""
    link: float
    """Bytes a second between it and host memory, each way."""


@dataclass(frozen=True)
class Request:
    """What is asked. Bytes where nothing else is said; None for no limit."""

    model: str
    batch: int
    """Sequences in a micro-batch of one rank."""
    sequence: int
    """Tokens in each."""
    host_memory: int | None = None
    """For each process, as `zeroxide train --host-memory`."""
    disk: Path | None = None
    """Directory for what is offloaded; None: nothing can be."""
    disk_bytes: int | None = None
    """For all ranks together."""
    device: OnPaper | None = None
    """Computes for each rank; None: the host does."""
    ranks: int = 1
    """All on one host."""
    drive_bytes: int | None = None
    """That a drive may be written in its life (TBW)."""
    clipped: float = 0.05
    """Of the steps, how many clip or are left out: 0.05 is one in twenty."""
    early: bool | None = None
    """Whether backward updates, where it can; None where an option decides."""
    config: dict[str, Any] = field(default_factory=dict)
    """What else the run's config says."""


@dataclass(frozen=True, order=True)
class Option:
    """One way of training."""

    offload: str
    format: str
    recompute: int = 0
    """So many of the first blocks compute their activations again in backward (`zeroxide.recompute`)."""
    in_memory: int = 0
    """Most bytes of the state that stay in host memory where its home is a disk (`zeroxide.state_in_memory`)."""
    stowed: bool = False
    """Activations wait for backward on disk (`zeroxide.activations`)."""
    early: bool = False
    """Backward updates each unit as soon as its gradients are complete (`zeroxide.update_in_backward`)."""

    def __str__(self) -> str:
        kept = f", {self.in_memory >> 20} MiB kept" if self.in_memory else ""
        again = f", recompute {self.recompute}" if self.recompute else ""
        early = ", early" if self.early else ""
        return f"{self.offload}, {self.format}{early}{again}{kept}{', activations on disk' if self.stowed else ''}"

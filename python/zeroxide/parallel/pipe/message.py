"""Which messages the ranks of a pipeline exchange: what each one is, and by which number both sides know it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ACTIVATIONS", "GRADIENTS", "TIED", "Message", "StageMessage", "TiedMessage", "tied_parts"]

ACTIVATIONS = "activations"
GRADIENTS = "gradients"
TIED = "tied weights"
TIED_PART = 4 << 20
"""Elements of a tied gradient that are exchanged at a time, where an engine is one process: the room that its sum
takes, however large the vocabulary is."""

_KINDS = (ACTIVATIONS, GRADIENTS, TIED)


@dataclass(frozen=True, slots=True)
class StageMessage:
    """What one micro-batch gives on its way out of a stage. kind: `ACTIVATIONS` or `GRADIENTS`."""

    kind: str
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind} of micro-batch {self.micro_batch} from stage {self.stage}"

    @property
    def contents(self) -> str:
        """What is sent, for errors about it."""
        return f"what stage {self.stage} gives"

    def number(self, stages: int) -> int:
        """No two messages that may be on their way at once have the same."""
        return (self.micro_batch * stages + self.stage) * len(_KINDS) + _KINDS.index(self.kind)

    @property
    def awaited(self) -> tuple[str, int]:
        """What a rank waits for, in words, and the number after them."""
        return f"{self.kind} from stage {self.stage} for micro-batch", self.micro_batch


@dataclass(frozen=True, slots=True)
class TiedMessage:
    """A part of what one rank of the pipeline says of a weight that several have. tie: its number among all."""

    tie: int
    part: int
    sender: int
    kind: str = TIED

    def __str__(self) -> str:
        return f"{self.kind}, number {self.tie}, part {self.part} of rank {self.sender}"

    @property
    def contents(self) -> str:
        """What is sent, for errors about it."""
        return f"what rank {self.sender} has of tied weights"

    def number(self, stages: int) -> int:
        """The same for all: two ranks exchange them in one order, and each has come before the next one leaves."""
        return _KINDS.index(TIED)

    @property
    def awaited(self) -> tuple[str, int]:
        """What a rank waits for, in words, and the number after them."""
        return f"{self.kind} {self.tie} of rank", self.sender


Message = StageMessage | TiedMessage


def tied_parts(elements: int, *, alone: bool) -> range:
    """Where the parts begin in which the gradient of a tied weight is exchanged. alone: whether an engine is one
    process; one of several has the gradient whole, so it goes at once."""
    return range(0, elements, TIED_PART if alone else elements)

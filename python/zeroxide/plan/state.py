"""How the parameters of a unit are updated and their state stored: one rule and one format a unit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from zeroxide import _core
from zeroxide.device.placement import DTYPE_NAMES

__all__ = ["UNDECIDED", "StatePlan", "rounding_stream"]


@dataclass(frozen=True)
class StatePlan:
    """An optimizer rule with a storage format, and the state tensors that they come to."""

    optimizer: _core.Rule
    rule: str
    """What parameter groups call the rule."""
    format: str
    tensors: tuple[tuple[str, str, int, float], ...]
    """Name, dtype, bytes of 64 elements and initial value of each, the live weight not among them."""

    @classmethod
    def of(cls, optimizer: _core.Rule, rule: str, format: str, compute: torch.dtype) -> StatePlan:
        """For weights of dtype `compute`. Raises ValueError for a format that does not go with it."""
        tensors = _core.state_tensors(optimizer, format, DTYPE_NAMES[compute])
        return cls(optimizer, rule, format, tuple(tensors[1:]))

    @property
    def initial(self) -> dict[str, float]:
        """The rule's own tensors, with what they start from."""
        # Beside fp32 weights there is nothing that makes a weight exact.
        own = _core.state_tensors(self.optimizer, "fp32", "f32")[1:]
        return {name: initial for name, _, _, initial in own}

    @classmethod
    def default(cls, format: str, compute: torch.dtype) -> StatePlan:
        """Adam's: what parameters count as that no optimizer updates."""
        adam = _core.Adam(
            lr=0.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=True, bias_correction=True
        )
        return cls.of(adam, "adam", format, compute)

    def bytes(self, elements: int) -> int:
        """Bytes of the state of that many elements, the live weight not counted; the last block of 64 counts whole."""
        return -(-elements // 64) * sum(size for _, _, size, _ in self.tensors)

    def fits(self, other: StatePlan) -> bool:
        """Whether one unit can hold parameters of both: their hyperparameters may differ."""
        return (self.rule, self.format, self.tensors) == (other.rule, other.format, other.tensors)


def rounding_stream(seed: int, name: str) -> int:
    """The key of the random bits that the state of a parameter is rounded with: a function of a seed and its name."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "little")


UNDECIDED = StatePlan.default("fp32", torch.float32)
"""Of units whose parameters have not been looked at yet."""

"""Which layers of a model are cut, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from zeroxide.config import TPLayerSpec

__all__ = ["OWN_PLAN", "LayerRule", "TPLayerSpec", "rule_of"]

OWN_PLAN = "tp_plan"
"""What the origin of a rule begins with that the model brings itself."""

Kind = Literal["column", "row", "skip"]


@dataclass(frozen=True)
class LayerRule:
    """How one module is cut.

    column: each rank computes a part of the output, or of an embedding's features.
    row: each rank takes a part of the input, or has a part of an embedding's rows, and the results are summed.
    skip: it is the same on all ranks.
    """

    kind: Kind
    blocks: int | tuple[int, ...] = 1
    """How many equal tensors are fused along the dimension that is cut, or the size of each."""
    gather_output: bool = False
    """Of a column: whether all ranks are given all of the output."""
    split_input: bool = False
    """Of a row: whether the input is the same on all ranks, and a rank takes its part of it."""
    grad_allreduce: bool = False
    """Of skip: whether each rank computes a part of the gradients, which are summed."""
    origin: str = ""
    """What says so, for messages."""


def rule_of(spec: TPLayerSpec, origin: str) -> LayerRule:
    """What a spec comes to."""
    return LayerRule(
        cast("Kind", spec.partition_type),
        spec.blocks,
        gather_output=spec.gather_output,
        grad_allreduce=spec.grad_allreduce,
        origin=origin,
    )

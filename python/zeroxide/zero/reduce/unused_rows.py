"""Blocks of rows that a backward did not come to, of matrices of which it used others.

The gradient of a matrix in one piece is zero in rows that nobody looked up, and an optimizer that has moments or decays
weights changes these as well. So a block without a gradient, beside one that has some, has one that is zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zeroxide import _core
from zeroxide.device.placement import HOST, spec
from zeroxide.rows import rows_of
from zeroxide.zero.names import plain_name
from zeroxide.zero.unit import Unit

__all__ = ["UnusedRows"]


class UnusedRows:
    """The matrices of one rank's units that are cut by rows."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.blocks: dict[str, list[tuple[Unit, int]]] = {}
        """Of each matrix, where its blocks are."""
        for unit in units:
            for position, param in enumerate(unit.params):
                if unit.trainable[position] and rows_of(param) is not None:
                    self.blocks.setdefault(plain_name(unit.names[position]), []).append((unit, position))

    def end_backward(self, core: _core.Offload) -> None:
        """Gives blocks that have no gradient one that is zero, where another of their matrix has one."""
        for blocks in self.blocks.values():
            missing = [each for each in blocks if not core.has_gradient(each[0].index, each[1])]
            for unit, position in missing if len(missing) < len(blocks) else ():
                none = torch.empty(0, dtype=torch.int64, device=HOST)
                values = torch.empty(0, unit.shapes[position][1], dtype=unit.flat.dtype, device=HOST)
                core.accumulate_rows(unit.index, position, unit.shapes[position][0], spec(none), spec(values))

"""Copies between tensors that are not aligned alike: words are put together from the two that they lie in."""

from __future__ import annotations

import pytest
import torch
from emulated import Emulator, Guards, same_bits

from zeroxide.kernels.arguments import FLOATS
from zeroxide.kernels.cast import TILE, cast

DTYPES = [*FLOATS]


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_every_shift_between_source_and_target(libraries, source, target):
    """A tensor has a tile whose packs are all whole, and one on each side that has others. Catches: words that are put
    together wrongly, and packs before the first element or after the last one that are taken for whole ones."""
    values = torch.randn(2 * TILE + 21, generator=torch.Generator().manual_seed(1)).to(source)
    wrong = []
    for of_source, of_target in [*((at, 0) for at in range(9)), (0, 1), (0, 5), (3, 3), (1, 6), (6, 1), (7, 7)]:
        guards = Guards()
        given = guards.copy(values, of_source)
        into = guards.copy(torch.zeros(len(values), dtype=target), of_target)
        cast(Emulator(libraries), [given], [into])
        if not guards.intact() or not same_bits(into, values.to(target)):
            wrong.append((of_source, of_target))
    assert wrong == []

"""Copies between tensors that are not aligned alike: words are put together from the two that they lie in."""

from __future__ import annotations

import pytest
import torch
from emulated import Emulator, Guards, same_bits

from zeroxide.errors import TensorError
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


def test_refusals():
    """One line that names the tensor; nothing is launched."""
    ones, half = torch.ones(4), torch.ones(4, dtype=torch.bfloat16)

    def refused(sources, targets):
        with pytest.raises(TensorError) as caught:
            cast(None, sources, targets)
        return caught.value.name, caught.value.expected, caught.value.got

    assert refused([ones, ones], [half]) == ("targets", "2 tensors", "1 tensors")
    assert refused([ones, half], [half, half]) == ("sources[1]", "float32", "bfloat16")
    assert refused([ones, ones], [half, ones]) == ("targets[1]", "bfloat16", "float32")
    assert refused([ones, ones], [half, half[:3]]) == ("targets[1]", "a tensor of 4 elements", "of 3 elements")
    assert refused([ones, torch.ones(8)[::2]], [half, half])[:2] == ("sources[1]", "a contiguous tensor")
    assert refused([ones, ones], [half, half.to("meta")]) == ("targets[1]", "a tensor on cpu", "on meta")
    assert refused([ones], [half.to("meta")]) == ("targets[0]", "a tensor on cpu", "on meta")

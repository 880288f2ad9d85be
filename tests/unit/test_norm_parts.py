"""The part of the norm that another rank counts."""

from __future__ import annotations

import pytest
import torch

from zeroxide.zero.reduce import norm


class Gradients:
    """The core's face for gradients: parameter 1 of unit 2, of which this rank has elements 5 to 15."""

    def __init__(self) -> None:
        self.values = torch.randn(20, generator=torch.Generator().manual_seed(3))
        self.most = 0

    def pieces(self, unit: int) -> list[tuple[int, int, int]]:
        return [(0, 0, 4), (1, 5, 10)]

    def read_param(self, unit: int, position: int, part: str, start: int, out: torch.Tensor) -> None:
        assert (unit, position, part) == (2, 1, "grad")
        self.most = max(self.most, len(out))
        out.copy_(self.values[start : start + len(out)])


@pytest.mark.parametrize("part", [3, 5, 10, 64])
def test_squares_are_summed_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    """Catches: a part that is left out or counted twice, and all of a large gradient in memory at once."""
    monkeypatch.setattr(norm, "spec", lambda tensor: tensor)
    monkeypatch.setattr(norm, "PART", part)
    core = Gradients()
    found = norm._squares(core, {(2, 1)})  # type: ignore[arg-type]
    # Ten squares in fp64, of which each and each sum is rounded once: 20 half units in the last place.
    assert found == pytest.approx(float(core.values[5:15].double().square().sum()), rel=20 * 2.0**-53)
    assert core.most == min(part, 10)

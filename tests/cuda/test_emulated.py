"""Every kernel on the host, from the source that a GPU runs: whatever the order of lanes, the size and the address."""

from __future__ import annotations

import pytest
from emulated import FORWARD, RANDOM, REVERSE, Emulator, run_guarded, special

import zeroxide.kernels
from zeroxide.kernels import arguments

CASES = {case.name: case for case in zeroxide.kernels.ALL}
SIZES = (0, 1, 31, 32, 33, 257, 1023, 4099)


@pytest.fixture(params=sorted(CASES))
def case(request):
    return CASES[request.param]


def test_sizes_and_orders(case, libraries):
    """Catches: a lane beyond the end, a missing barrier, work that two blocks do or none."""
    wrong = {}
    for n in SIZES:
        for order in (FORWARD, REVERSE, RANDOM) if n in (33, 4099) else (RANDOM,):
            found = run_guarded(case, n, Emulator(libraries, order, seed=n))
            if found:
                wrong[n, order] = found
    assert wrong == {}


def test_unaligned_views(case, libraries):
    """Catches: wide loads where the address does not allow them."""
    wrong = {}
    for shift, only in ((1, None), (1, 0), (1, 1), (3, 2), (3, 3)):
        found = run_guarded(case, 1025, Emulator(libraries, RANDOM, seed=shift), shift, only)
        if found:
            wrong[shift, only] = found
    assert wrong == {}


def test_more_than_the_grid(case, libraries, monkeypatch):
    """Catches: lanes that stop after their first item. Grids have one and two blocks here instead of thousands."""
    for blocks in (1, 2):
        monkeypatch.setattr(arguments, "LARGEST_GRID", blocks)
        assert run_guarded(case, 40_003, Emulator(libraries, FORWARD)) is None


@pytest.mark.parametrize("finite", [True, False])
def test_special_values(case, libraries, finite):
    """Catches: a NaN that a comparison loses, an infinity that becomes one, denormals flushed to zero, ties."""
    found = run_guarded(case, 2000, Emulator(libraries), change=lambda inputs: special(inputs, finite=finite))
    assert found is None

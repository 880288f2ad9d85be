"""What is written through `.data` goes past version counters, and between ranks past the others: it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import run_ranks

PROGRAM = Path(__file__).with_name("param_data_ranks.py")


@pytest.mark.parametrize(("stage", "home"), [(1, "shared"), (3, "shared"), (3, "collective"), (3, "nvme")])
def test_a_change_through_data_is_named_and_a_look_is_not(stage, home):
    """Catches: a change that two ranks make of the same memory, or that is gone with the unit."""
    results = run_ranks(2, PROGRAM, [str(stage), home])
    # Where a rank cannot go on, the other one is ended with its words.
    assert any(result.code == 0 for result in results), [result.err[-1500:] for result in results]
    for result in results:
        assert result.code == 0 or "layers.2.linear.weight" in result.err, result.err[-1500:]

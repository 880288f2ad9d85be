"""Whoever uses a weight, it is there, also where weights move between ranks, or what cannot be brought is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import run_ranks

PROGRAM = Path(__file__).with_name("ways_ranks.py")
WAYS = [
    "only one block's auxiliary loss",
    "auxiliary losses read outside of forward",
    "blocks return plain objects",
    "a parent calls the parts of a block",
    "a parent calls the parts of all blocks in turn",
    "a checkpointed block whose parts a parent calls",
    "a module reads its child's weight",
    "a block reads another block's parameter",
    "owners nested five deep",
    "nn.TransformerEncoder, evaluated between steps",
    "blocks return views of their weights",
    "blocks return their weights",
    "reversible blocks",
    "a head tied by hand",
]
READ_BY_OTHERS = {
    "a module reads its child's weight",
    "a block reads another block's parameter",
    "owners nested five deep",
    "nn.TransformerEncoder, evaluated between steps",
    "a head tied by hand",
}
"""Where each owner's parameters are a unit: backward of another module announces nothing, and five have no room."""
WHOLE, TINY = 512 << 20, 8


@pytest.mark.parametrize(("home", "unit_bytes"), [("collective", WHOLE), ("collective", TINY), ("nvme", TINY)])
def test_unusual_use_of_weights_has_plain_torchs_gradients(home, unit_bytes):
    """Catches: views of weights that outlive their gathering; parts, and recomputed parts, that nobody announced."""
    names = [name for name in WAYS if unit_bytes == WHOLE or name not in READ_BY_OTHERS]
    for rank, result in enumerate(run_ranks(2, PROGRAM, [home, str(unit_bytes), *names])):
        said = [line for line in result.out.splitlines() if line.startswith(("same", "failed"))]
        assert said == [f"same {name}" for name in names], f"rank {rank}: {said}\n{result.err[-2000:]}"


@pytest.mark.parametrize(
    "name", ["hooks keep detached weights", "the root reads weights of blocks", "the weights of all blocks stacked"]
)
def test_what_cannot_be_brought_is_named(name):
    """Catches: zeros, stale values or tensors of size 0 that are computed with; a signal."""
    for result in run_ranks(2, PROGRAM, ["collective", str(WHOLE), name]):
        assert result.code == 1
        assert (
            f"failed {name}: ModelError: weights of layers." in result.out or "BudgetError: unit layers" in result.out
        )

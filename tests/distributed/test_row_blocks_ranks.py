"""Matrices cut by rows over several ranks, which look up rows of different blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import run_ranks

PROGRAM = Path(__file__).with_name("row_blocks_ranks.py")


@pytest.mark.parametrize(
    ("stage", "transport", "kind"), [(3, "auto", "tied"), (3, "collective", "apart"), (1, "auto", "apart")], ids=str
)
def test_ranks_that_use_different_blocks_train_the_same_model(
    stage: int, transport: str, kind: str, tmp_path: Path
) -> None:
    """Catches: a block that one rank gathers and another does not, which waits for ever; its gradient reduced without
    one of them; rows of checkpoints and state dicts from one rank alone."""
    for rank, result in enumerate(run_ranks(2, PROGRAM, [str(stage), transport, kind, str(tmp_path)], timeout=60)):
        assert result.code == 0, f"rank {rank}: {result.out[-1000:]}\n{result.err[-2000:]}"
        assert "same" in result.out

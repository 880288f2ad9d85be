"""Weights that every rank changes alike: the same bits at stages 0 to 2, in both formats, wherever the state is."""

from __future__ import annotations

from pathlib import Path

from launching import run_ranks


def test_edits_on_all_ranks_count():
    """Catches: a master that overwrites the edit, and reading weights of another shard that are old."""
    for rank, result in enumerate(run_ranks(2, Path(__file__).with_name("param_edits_ranks.py"), [], timeout=240)):
        assert result.out.splitlines() == ["same"] * 6, f"rank {rank}:\n{result.out[-3000:]}\n{result.err[-3000:]}"

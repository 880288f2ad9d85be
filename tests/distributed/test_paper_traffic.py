"""What a plan on paper says that ranks send, and have, is what they do: to the byte, in every pair of axes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import run_ranks

JOB = Path(__file__).parent / "paper_ranks.py"
Case = dict[str, Any]
BASE: Case = {"numbers": 4, "clip": 0.5, "lr": 1e-3, "stage": 1}
MOE: Case = {**BASE, "model": "mixtral", "experts": 4}
PAIRS: list[Case] = [
    {**BASE, "name": "tp x dp", "model": "llama", "tp": 2, "stage": 2},
    {**BASE, "name": "pp x tp", "model": "llama", "pp": 2, "tp": 2},
    {**BASE, "name": "pp x tp tied", "model": "gpt2", "pp": 2, "tp": 2},
    {**BASE, "name": "sp x tp", "model": "llama", "sp": 2, "tp": 2, "stage": 3},
    {**BASE, "name": "pp x sp", "model": "llama", "pp": 2, "sp": 2, "stage": 3},
    {**BASE, "name": "pp x dp tied", "model": "gpt2", "pp": 2, "stage": 3},
    {**BASE, "name": "pp x dp replicated", "model": "llama", "pp": 2, "stage": 0},
    {**BASE, "name": "pp x dp", "model": "llama", "pp": 2, "stage": 2},
    {**BASE, "name": "sp x dp", "model": "gpt2", "sp": 2, "stage": 3},
    {**BASE, "name": "pp 4", "model": "llama", "pp": 4},
]
LOOPED = {"pipeline": {"schedule": "interleaved_1f1b", "stages_per_rank": 2}}
MORE: list[Case] = [
    {**BASE, "name": "chunks in shards", "model": "llama", "pp": 2, "stage": 3, "config": LOOPED},
    {**BASE, "name": "hybrid", "model": "llama", "stage": 3, "own": {"mesh": {"dp_replicate": 2, "dp_shard": 2}}},
    {**BASE, "name": "pp x tp, again", "model": "llama", "pp": 2, "tp": 2, "again": True},
    {**BASE, "name": "pp x sp, again", "model": "llama", "pp": 2, "sp": 2, "stage": 2, "again": True},
]
EXPERTS: list[Case] = [
    {**MOE, "name": "ep x dp", "ep": 2, "stage": 3},
    {**MOE, "name": "ep 4", "ep": 4, "stage": 2},
    {**MOE, "name": "ep x tp", "ep": 2, "tp": 2},
    {**MOE, "name": "pp x ep", "pp": 2, "ep": 2},
    {**MOE, "name": "sp x ep", "sp": 2, "ep": 2, "stage": 3},
]
TWO: list[Case] = [
    {**BASE, "name": "dp, stage 3", "model": "llama", "stage": 3},
    {**BASE, "name": "pp", "model": "gpt2", "pp": 2},
    {**MOE, "name": "ep", "ep": 2},
    {**BASE, "name": "gpipe", "model": "llama", "pp": 2, "config": {"pipeline": {"schedule": "gpipe"}}},
    {**BASE, "name": "interleaved", "model": "llama", "pp": 2, "config": LOOPED},
    {
        **BASE,
        "name": "halves",
        "model": "llama",
        "pp": 2,
        "config": {"pipeline": {"schedule": "zbv_zero_bubble", "stages_per_rank": 2}},
    },
]


def check(world: int, cases: list[Case], folder: Path) -> None:
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    for rank, result in enumerate(run_ranks(world, JOB, [str(path)], timeout=280)):
        assert result.code == 0, f"rank {rank}:\n{result.out[-1000:]}\n{result.err[-3000:]}"
        found = [json.loads(line[5:]) for line in result.out.splitlines() if line.startswith("CASE ")]
        for case, each in zip(cases, found, strict=True):
            what = f"{case['name']}, rank {rank}: {each['kinds']}"
            assert each["sent"] == each["planned"], what
            assert each["buckets"][0] == each["buckets"][1], what
            if "own" in each:
                assert each["own"][0] == each["own"][1], what


def test_pairs_of_axes_send_what_is_planned(tmp_path: Path) -> None:
    """Catches: a message that no formula has, or is counted once where every micro-batch sends it."""
    check(4, PAIRS, tmp_path)


def test_groups_chunks_and_recomputation_send_what_is_planned(tmp_path: Path) -> None:
    """Catches: units of one stage gathered for another, sums that replicas exchange, what backward computes again and
    sends again."""
    check(4, MORE, tmp_path)


def test_experts_send_what_is_planned(tmp_path: Path) -> None:
    """Of tokens that are routed evenly. Catches: a way of tokens or gradients that is left out."""
    check(4, EXPERTS, tmp_path)


@pytest.mark.parametrize("cases", [TWO[:3], TWO[3:]], ids=["axes", "schedules"])
def test_two_ranks_send_what_is_planned(cases: list[Case], tmp_path: Path) -> None:
    """Catches: what a schedule leaves in memory from one micro-batch to the next, counted again."""
    check(2, cases, tmp_path)

"""Micro-batches layer by layer over ranks: the bits of one after the other, and weights gathered once a pass.

Catches gradients of two micro-batches that are added before they are summed over ranks, reductions in an order that
ranks do not share, and units that are gathered anew for every micro-batch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import run_ranks

PROGRAM = Path(__file__).with_name("accumulation_order_ranks.py")

CASES: list[dict[str, Any]] = [
    {},
    {"transport": "collective"},
    {"stage": 0, "transport": "collective"},
    {"stage": 1},
    {"stage": 2, "optimizer": "nvme", "transport": "collective"},
    {"param": "cpu", "optimizer": "cpu"},
    {"param": "nvme", "optimizer": "nvme"},
    {"param": "nvme", "optimizer": "cpu", "transport": "collective", "count": 4},
    {"family": "gpt-reentrant", "transport": "collective"},
    {"family": "gpt-nonreentrant"},
    {"family": "partly-frozen", "transport": "collective"},
    {"family": "used-twice"},
    {"family": "untied", "transport": "collective"},
    {"family": "untied"},
    {"family": "sometimes-cut", "transport": "collective"},
    {"family": "sometimes-cut"},
]


def run(world: int, cases: list[dict[str, Any]], folder: Path) -> list[list[Any]]:
    results = run_ranks(world, PROGRAM, [json.dumps(cases), str(folder)], timeout=240)
    for result in results:
        assert result.code == 0, result.err
    found = [
        [json.loads(line.removeprefix("CASE ")) for line in result.out.splitlines() if line.startswith("CASE ")]
        for result in results
    ]
    assert all(len(each) == len(cases) for each in found)
    return found


@pytest.mark.timeout(600)
def test_two_ranks(tmp_path):
    for ranks in run(2, CASES, tmp_path):
        for case, result in zip(CASES, ranks, strict=True):
            assert result["different"] == [], case
            assert result["switched"] > 0, case
            one, other = (each[1] for each in result["sent"])
            # Weights travel once a pass, and not once a micro-batch: in one of three or four.
            moves = case.get("stage", 3) == 3 and (case.get("transport") == "collective" or case.get("param") == "nvme")
            assert (0 < 2 * other < one) if moves else (other == one), case


@pytest.mark.timeout(300)
def test_four_ranks_in_two_groups(tmp_path):
    cases = [{"mesh": {"dp_shard": 2}, "transport": "collective"}, {"mesh": {"dp_shard": 2}, "param": "nvme"}]
    for ranks in run(4, cases, tmp_path):
        assert [each["different"] for each in ranks] == [[], []]


@pytest.mark.timeout(300)
def test_a_rank_whose_micro_batches_go_another_way_takes_the_others_with_it(tmp_path):
    """Ranks agree on the order of backward, or they would wait for different things."""
    for ranks in run(2, [{"family": "twice-on-one-rank"}], tmp_path):
        assert [(each["different"], each["switched"]) for each in ranks] == [([], 0)]


def test_an_iterator_that_ends_on_one_rank_ends_training_on_all(tmp_path):
    for ranks in run(2, [{"short": 1}], tmp_path):
        line = "train_batch: the iterator on rank 1 ended after 2 of 3 micro-batches: these were left out"
        assert ranks == [[line, line]]

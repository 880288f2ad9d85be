"""Tensor parallelism over real processes, against plain PyTorch in one process.

Sums over tensor ranks are taken in another order than one process takes them, and nothing else differs. How far that
leads in 20 steps is measured on plain PyTorch itself: its distance in single from double precision is what rounding
makes of the same sums in yet another order, and no order is better than another. The largest of some thousand elements
may differ by a small factor between two orders: four.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import run_ranks
from tensor_models import STEPS

PROGRAM = Path(__file__).with_name("tensor_program.py")
LOOK = 5
"""Steps after which runs in different modes are compared, bit for bit."""

MODES: list[dict[str, Any]] = [
    {"stage": 0},
    {"stage": 1, "home": "cpu", "transport": "collective"},
    {"stage": 2, "home": "nvme", "gradients": "disk"},
    {"stage": 3},
    {"stage": 3, "home": "cpu", "transport": "collective"},
    {"stage": 3, "home": "nvme"},
]


def run(world: int, cases: list[dict[str, Any]], folder: Path) -> list[list[dict[str, Any]]]:
    """What every rank found, case by case."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    found = []
    for result in run_ranks(world, PROGRAM, [str(path)], timeout=280):
        assert result.code == 0, result.err[-3000:]
        lines = [line.removeprefix("CASE ") for line in result.out.splitlines() if line.startswith("CASE ")]
        found.append([json.loads(line) for line in lines])
    return [list(each) for each in zip(*found, strict=True)]


def check(cases: list[dict[str, Any]], found: list[list[dict[str, Any]]]) -> None:
    first: dict[str, str] = {}
    for case, ranks in zip(cases, found, strict=True):
        name = f"{case['family']} {case}"
        for rank in ranks:
            assert rank["norms"] == ranks[0]["norms"], name
            assert rank["digests"] == ranks[0]["digests"], name
            assert rank["copies"] == ranks[0]["copies"], f"{name}: ranks have what is not cut in two ways"
        bits = ranks[0]["digests"][str(LOOK)]
        assert bits == first.setdefault(case.get("group", case["family"]), bits), f"{name}: not the bits of the first"
        if case["steps"] == STEPS:
            check_beside_plain(name, ranks[0])


def check_beside_plain(name: str, found: dict[str, Any]) -> None:
    for got, plain in zip(found["losses"], found["plain_losses"], strict=True):
        assert abs(got - plain) <= 2e-6 * plain, name
    for got, exact in zip(found["norms"], found["exact_norms"], strict=True):
        assert abs(got - exact) <= 1e-5 * exact, name
    assert found["far"] <= 4 * found["usual"], (name, found["far"], found["usual"])
    # What the bound allows is far below what training does: a wrong gradient does not pass.
    assert found["far"] < 1e-3 * found["moved"], (name, found["far"], found["moved"])


def cases_of(families: list[str], modes: list[dict[str, Any]], tp: int = 2) -> list[dict[str, Any]]:
    """The first mode trains on to the end."""
    return [
        {"family": family, "tp": tp, "look": [LOOK], "steps": LOOK if number else STEPS, **mode}
        for family in families
        for number, mode in enumerate(modes)
    ]


@pytest.mark.timeout(300)
def test_two_ranks_train_as_one_process_does(tmp_path):
    """Catches: gradients of the input that are not summed, a bias that is added on every rank, heads that are cut
    through, a norm that counts twice what both ranks have, weights of another rank than the first, a stage or a home of
    state that changes a bit."""
    cases = cases_of(["gpt2"], MODES) + cases_of(["llama", "uneven", "qwen3", "t5"], [MODES[3], MODES[1]])
    # Of logits that stay apart the loss is summed in one more order: other bits, within the same bound.
    apart = {"group": "apart", "stage": 3, "tensor_parallel": {"vocab_parallel_lm_head": True}}
    cases += cases_of(["llama"], [apart])
    # In bf16 ranks stay alike; what they compute is no test of the order of sums.
    cases += [{**each, "bf16": True, "group": "bf16", "steps": LOOK} for each in cases_of(["t5"], [MODES[3], MODES[2]])]
    check(cases, run(2, cases, tmp_path))


@pytest.mark.timeout(300)
def test_four_ranks_train_as_one_process_does(tmp_path):
    """Two replicas of two tensor ranks, and one of four. Catches: a batch that tensor ranks do not share, gradients
    that are summed over tensor ranks as well, shards of one part of a matrix that go to the ranks of another."""
    cases = cases_of(["gpt2"], [MODES[3], MODES[1], MODES[2]]) + cases_of(["uneven"], [MODES[5]])
    cases += cases_of(["gpt2"], [{"group": "four", **MODES[3]}], tp=4)
    check(cases, run(4, cases, tmp_path))

"""Axes together train as plain PyTorch does in one process, and any composition goes on from any other."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from composed_models import train_plain
from launching import run_ranks

from zeroxide.checkpoint.convert.portable import read_own

JOB = Path(__file__).parent / "composed_ranks.py"
STEPS, NUMBERS, CLIP, LR = 20, 4, 0.5, 1e-3
LOSS = 2e-6
"""Most that losses differ by, relative to plain fp32: sums of n terms of one sign have at most n - 1 roundings of 6e-8,
pairwise ones far fewer; 2e-6 is some 30 of them."""
TIMES = 4
"""Weights: both evaluations differ from float64 by rounding alone, in sums of another order. Neither order is better
than the other, so the greatest error of one is that of the other within a small factor."""

Case = dict[str, Any]
BASE: Case = {"steps": STEPS, "numbers": NUMBERS, "clip": CLIP, "lr": LR, "stage": 1}
PAIRS: list[Case] = [
    {**BASE, "name": "tp x dp", "model": "llama", "tp": 2, "stage": 2},
    {**BASE, "name": "pp x tp", "model": "llama", "pp": 2, "tp": 2},
    {**BASE, "name": "pp x tp tied", "model": "gpt2", "pp": 2, "tp": 2},
    {**BASE, "name": "sp x tp", "model": "llama", "sp": 2, "tp": 2, "stage": 3},
    {**BASE, "name": "pp x sp", "model": "llama", "pp": 2, "sp": 2, "stage": 3},
    {**BASE, "name": "pp x sp tied", "model": "gpt2", "pp": 2, "sp": 2},
    {**BASE, "name": "pp x dp", "model": "gpt2", "pp": 2, "stage": 3},
    {**BASE, "name": "sp x dp", "model": "gpt2", "sp": 2, "stage": 3},
]
EXPERTS: list[Case] = [
    {**BASE, "name": "ep x dp", "model": "mixtral", "ep": 2, "stage": 3},
    {**BASE, "name": "ep 4", "model": "mixtral", "ep": 4, "stage": 2},
    {**BASE, "name": "ep x tp", "model": "mixtral", "ep": 2, "tp": 2},
    {**BASE, "name": "pp x ep", "model": "mixtral", "pp": 2, "ep": 2},
    {**BASE, "name": "sp x ep", "model": "mixtral", "sp": 2, "ep": 2, "stage": 3},
]
MODES: list[Case] = [
    {**BASE, "name": f"mode {number}", "model": "llama", "pp": 2, "tp": 2, "steps": 4, **mode}
    for number, mode in enumerate(
        (
            {"stage": 0},
            {"stage": 1, "optimizer": "cpu"},
            {"stage": 3, "param": "cpu", "optimizer": "cpu"},
            {"stage": 3, "param": "nvme", "optimizer": "nvme"},
        )
    )
]


@functools.cache
def plain(kind: str, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    return train_plain(kind, steps, NUMBERS, CLIP, LR, dtype)


def run(world: int, cases: list[Case], folder: Path) -> list[list[dict[str, Any]]]:
    """What each rank found in each case."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    found = []
    for rank, result in enumerate(run_ranks(world, JOB, [str(path)], timeout=400)):
        assert result.code == 0, f"rank {rank}:\n{result.out[-1000:]}\n{result.err[-3000:]}"
        found.append([json.loads(line[5:]) for line in result.out.splitlines() if line.startswith("CASE ")])
        assert len(found[-1]) == len(cases)
    return found


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint, by the first names of parameters."""
    found = read_own(folder, moments=False)
    return {
        each.name: torch.cat([part.clone() for part in found.segments[each.name, "weights"]]).double().view(each.shape)
        for each in found.parameters
    }


def check_against_plain(case: Case, ranks: list[dict[str, Any]], folder: Path, steps: int = STEPS) -> None:
    low, high = plain(case["model"], steps, torch.float32), plain(case["model"], steps, torch.float64)
    for rank, found in enumerate(ranks):
        what = f"{case['name']}, rank {rank}"
        assert found["losses"] == pytest.approx(low["losses"][-case["steps"] :], rel=LOSS), what
        assert found["norms"] == pytest.approx(low["norms"][-case["steps"] :], rel=1e-5), what
        assert (found["losses"], found["norms"]) == (ranks[0]["losses"], ranks[0]["norms"]), what
    weights = saved_weights(folder / case["name"] / "end")
    assert set(weights) == set(high["weights"])
    worst = max(float((low["weights"][name] - high["weights"][name]).abs().max()) for name in weights)
    for name, values in weights.items():
        off = float((values - high["weights"][name]).abs().max())
        assert off <= TIMES * worst, f"{case['name']}: {name} is off by {off}, plain fp32 by at most {worst}"


def test_axes_together_train_as_one_process(tmp_path: Path) -> None:
    """Catches: a norm that counts what tensor ranks or stages have alike more than once, or one part's alone; a batch
    or a mean over the wrong ranks; a tied weight of which each tensor rank has a part, summed over the wrong ones."""
    found = run(4, PAIRS, tmp_path)
    for at, case in enumerate(PAIRS):
        check_against_plain(case, [each[at] for each in found], tmp_path)


def test_axes_together_train_experts_as_one_process(tmp_path: Path) -> None:
    """Catches: an expert's gradient averaged over the wrong ranks, or counted twice in the norm."""
    found = run(4, EXPERTS, tmp_path)
    for at, case in enumerate(EXPERTS):
        check_against_plain(case, [each[at] for each in found], tmp_path)


def test_a_composition_has_the_same_bits_in_every_mode(tmp_path: Path) -> None:
    """Catches: any dependence on stages and homes."""
    for ranks in run(4, MODES, tmp_path):
        for case, each in zip(MODES, ranks, strict=True):
            assert (each["losses"], each["norms"]) == (ranks[0]["losses"], ranks[0]["norms"]), case["name"]
    first = saved_weights(tmp_path / MODES[0]["name"] / "end")
    for case in MODES[1:]:
        other = saved_weights(tmp_path / case["name"] / "end")
        assert {name: torch.equal(values, other[name]) for name, values in first.items()} == dict.fromkeys(first, True)


def test_any_composition_goes_on_from_any_other(tmp_path: Path) -> None:
    """A chain: each case begins with what the one before has saved. Catches: a region in the wrong place, state of one
    part that is lost, counters and counts of updates that are not taken over."""
    chain = [
        {"name": "a", "pp": 2, "tp": 2},
        {"name": "b", "tp": 2, "stage": 3},
        {"name": "c", "sp": 2, "stage": 3, "optimizer": "nvme"},
        {"name": "d", "tp": 4, "model": "gpt2"},
        {"name": "e", "pp": 4},
        {"name": "f", "stage": 2},
    ]
    for model in ("gpt2",):
        cases: list[Case] = []
        for number, each in enumerate(chain):
            before = {} if number == 0 else {"load": chain[number - 1]["name"]}
            cases.append({**BASE, "model": model, **each, "steps": 3, **before})
        found = run(4, cases, tmp_path)
        for at, case in enumerate(cases):
            check_against_plain(case, [each[at] for each in found], tmp_path, 3 * (at + 1))

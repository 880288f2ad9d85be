"""Pipelines of real processes train as plain PyTorch does in one, whatever is at home where inside a stage."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_ranks
from pipeline_models import train_plain

JOB = Path(__file__).parent / "pipeline_ranks.py"
STEPS, NUMBERS, CLIP, LR = 20, 4, 0.5, 1e-3
LOSS = 2e-6
"""Most that losses and norms differ by, relative to plain fp32: a sum of n terms of one sign has at most n - 1
roundings of 6e-8, pairwise sums far fewer; 2e-6 is some 30 of them."""
TIMES = 4
"""Weights: both evaluations differ from float64 by rounding alone, in sums of another order. Neither order is better
than the other, so the greatest error of one is that of the other within a small factor."""

Case = dict[str, Any]
BASE: Case = {"steps": STEPS, "numbers": NUMBERS, "clip": CLIP, "lr": LR, "stage": 1, "pp": 2}


@functools.cache
def plain(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    return train_plain(kind, STEPS, NUMBERS, dtype, CLIP, LR)


def run(world: int, cases: list[Case], folder: Path) -> list[list[dict[str, Any]]]:
    """What each rank found in each case."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    found = []
    for rank, result in enumerate(run_ranks(world, JOB, [str(path)], timeout=200)):
        assert result.code == 0, f"rank {rank}:\n{result.out[-1000:]}\n{result.err[-3000:]}"
        found.append([json.loads(line[5:]) for line in result.out.splitlines() if line.startswith("CASE ")])
        assert len(found[-1]) == len(cases)
    return found


def check_against_plain(case: Case, ranks: list[dict[str, Any]]) -> None:
    low, high = plain(case["kind"], torch.float32), plain(case["kind"], torch.float64)
    named: dict[str, torch.Tensor] = {}
    for rank, found in enumerate(ranks):
        what = f"{case['name']}, rank {rank}"
        assert found["losses"] == pytest.approx(low["losses"], rel=LOSS), what
        assert found["norms"] == pytest.approx(low["norms"], rel=1e-5), what
        assert found["evaluated"] == pytest.approx(low["evaluated"], rel=LOSS), what
        assert found["losses"] == ranks[0]["losses"], what
        assert found["norms"] == ranks[0]["norms"], what
        assert not found["threads"], what
        for name, values in torch.load(found["weights"]).items():
            if name in named:
                assert torch.equal(values, named[name]), f"{what}: {name} is not one parameter on all ranks"
            named[name] = values.double()
    tied = {"gpt2": {"lm_head.weight"}}.get(case["kind"], set())
    assert set(named) == set(high["weights"]) - tied
    worst = max((low["weights"][name] - high["weights"][name]).abs().max() for name in named)
    for name, values in named.items():
        off = (values - high["weights"][name]).abs().max()
        assert off <= TIMES * worst, f"{case['name']}: {name} is off by {off}, plain fp32 by at most {worst}"


TWO: list[Case] = [
    {**BASE, "name": "tied layers", "kind": "tied layers"},
    {**BASE, "name": "free layers recomputed", "kind": "free layers", "schedule": "gpipe", "interval": 2, "stage": 0},
    {**BASE, "name": "gpt2", "kind": "gpt2"},
    {**BASE, "name": "gpt2 interleaved", "kind": "gpt2", "schedule": "interleaved_1f1b", "stages_per_rank": 2},
    {**BASE, "name": "llama", "kind": "llama", "by_mesh": True, "stage": 3, "optimizer_of_all": True},
    {**BASE, "name": "gpt2 halves", "kind": "gpt2", "schedule": "interleaved_zero_bubble", "stages_per_rank": 2},
    {**BASE, "name": "llama v", "kind": "llama", "schedule": "dualpipe_v", "stages_per_rank": 2, "stage": 3},
    {**BASE, "name": "llama looped", "kind": "llama", "schedule": "looped_bfs", "stages_per_rank": 2, "stage": 2},
]
MODES: list[Case] = [
    {**BASE, "name": "mode 1", "kind": "gpt2"},
    {**BASE, "name": "mode 2", "kind": "gpt2", "stage": 0},
    {**BASE, "name": "mode 3", "kind": "gpt2", "stage": 2, "optimizer": "cpu"},
    {**BASE, "name": "mode 4", "kind": "gpt2", "stage": 3, "param": "cpu", "optimizer": "nvme"},
    {**BASE, "name": "mode 5", "kind": "gpt2", "stage": 3, "param": "nvme", "optimizer": "nvme"},
    {**BASE, "name": "tied parts", "kind": "gpt2", "stage": 3, "param": "nvme", "optimizer": "nvme", "tied_part": 500},
]
"""In one composition; bit for bit the same."""


def check_same_bits(cases: list[Case], found: list[list[dict[str, Any]]]) -> None:
    for ranks in found:
        for case, each in zip(cases, ranks, strict=True):
            for key in ("losses", "norms", "digests", "evaluated"):
                assert each[key] == ranks[0][key], f"{case['name']} differs from {cases[0]['name']} in {key}"


def test_two_stages_train_as_one_process(tmp_path: Path) -> None:
    """Catches: losses divided twice or not at all, a gradient of the boundary that is dropped, labels or masks of
    another micro-batch, tied weights whose gradients are not summed or are counted twice in the norm, and blocks that
    run in another stage than their own."""
    found = run(2, TWO, tmp_path)
    for at, case in enumerate(TWO):
        ranks = [each[at] for each in found]
        check_against_plain(case, ranks)
        turned = case.get("schedule") == "dualpipe_v"
        ends = [[True, True], [False, False]] if turned else [[True, False], [False, True]]
        assert [each["ends"] for each in ranks] == ends, case["name"]
    units = [each[TWO.index(next(case for case in TWO if case["name"] == "gpt2"))]["units"] for each in found]
    assert units == [["root", "transformer.h.0", "transformer.h.1"], ["root", "transformer.h.2", "transformer.h.3"]]


def test_a_stage_has_the_same_bits_in_every_mode(tmp_path: Path) -> None:
    """Catches: a mode whose gradients, clipping or tied weights go another way, and a tied gradient that is exchanged
    in parts of which one is left out, is added to another's place, or is not sent back."""
    found = run(2, MODES, tmp_path)
    check_same_bits(MODES, found)
    check_against_plain(MODES[-1], [each[-1] for each in found])


FOUR: list[Case] = [
    {**BASE, "name": "4 stages", "kind": "gpt2", "pp": 4, "stage": 3, "param": "nvme", "optimizer": "nvme"},
    {**BASE, "name": "2 x 2", "kind": "gpt2", "stage": 1},
    {**BASE, "name": "2 x 2, 3", "kind": "gpt2", "stage": 3, "optimizer": "nvme"},
    {**BASE, "name": "2 x 2 layers", "kind": "tied layers", "stage": 2},
    {**BASE, "name": "2 x 2 v", "kind": "tied layers", "schedule": "zbv_zero_bubble", "stages_per_rank": 2},
]


def test_activations_that_wait_on_disk_have_the_same_bits(tmp_path: Path) -> None:
    """Catches: what another micro-batch's backward gives away, a gradient of the boundary that is lost with the memory
    of what came, and what both halves of a backward read."""
    own = {"activations": "disk", "activation_path": str(tmp_path / "activations"), "activation_buffers": "64KiB"}
    for schedule in ({}, {"schedule": "interleaved_zero_bubble", "stages_per_rank": 2}):
        case = {**BASE, "steps": 4, "name": "memory", "kind": "gpt2", **schedule}
        cases = [case, {**case, "name": "disk", "config": {"zeroxide": own}}]
        found = run(2, cases, tmp_path)
        check_same_bits(cases, found)
        assert [[each["stored"] > 0 for each in ranks] for ranks in found] == [[False, True]] * 2


def test_four_ranks_as_stages_and_as_replicas_of_stages(tmp_path: Path) -> None:
    """Catches: middle stages that begin or end the model, gradients that are averaged over stages, and replicas whose
    ties meet the wrong rank."""
    found = run(4, FOUR, tmp_path)
    for at, case in enumerate(FOUR):
        check_against_plain(case, [each[at] for each in found])
    # One composition: the stage of ZeRO and where state is change no bit.
    check_same_bits(FOUR[1:3], [each[1:3] for each in found])


def test_a_checkpoint_is_of_the_whole_model(tmp_path: Path) -> None:
    """Catches: parts that are missing from the manifest, a tied weight that is there twice, state of another stage's
    parameter, and a resumed run that begins with other weights, moments or counters."""
    folder = str(tmp_path / "checkpoints")
    # 2 stages go on as 1, as 4 ranks and as they were, in another offload mode.
    ways = {"gpt2": ((4, 2, {}), (2, 2, {"stage": 3, "optimizer": "nvme"})), "tied layers": ((1, 1, {}),)}
    for kind, ways_on in ways.items():
        how = {**BASE, "kind": kind, "checkpoint": f"{folder}-{kind}", "steps": 6}
        straight = run(2, [{**how, "name": "saves", "save_at": 3}], tmp_path)
        for world, pp, mode in ways_on:
            case = {**how, **mode, "name": f"goes on in {pp} of {world}", "pp": pp, "load_at": 3, "first": 3}
            found = run(world, [case], tmp_path)
            assert found[0][0]["losses"] == pytest.approx(straight[0][0]["losses"][3:], rel=LOSS)
            if world == 2:
                assert [each[0]["digests"] for each in found] == [each[0]["digests"] for each in straight]

"""Real ranks train the same in every stage, offload mode and transport, as DDP does, and at every world size.

One job a world size runs many trainings one after the other in the same processes (`training.py`), which also shows
that engines can follow one another and leave nothing behind. What is compared with what:

- between zeroxide's own ways of running: bit for bit, weights, moments, live weights, buffers, losses and norms;
- with DDP, and between world sizes: losses bit for bit and every step within the bound of `traces.py`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import run_ranks

JOB = Path(__file__).parent / "training.py"
Case = dict[str, Any]

MODES: list[Case] = [
    {"stage": 3, "transport": "shared_memory"},
    {"stage": 0, "transport": "shared_memory"},
    {"stage": 3, "transport": "collective"},
    {"stage": 1, "optimizer": "nvme", "transport": "shared_memory"},
    {"stage": 3, "param": "nvme", "optimizer": "nvme", "transport": "shared_memory", "gradients": "disk"},
    {"stage": 2, "optimizer": "cpu", "transport": "collective"},
    {"stage": 3, "param": "cpu", "optimizer": "nvme", "transport": "collective"},
    {"stage": 0, "transport": "collective"},
    {"stage": 3, "param": "nvme", "optimizer": "cpu", "transport": "collective"},
    {"stage": 2, "optimizer": "nvme", "transport": "shared_memory"},
    {"stage": 1, "optimizer": "nvme", "transport": "collective", "gradients": "disk"},
    {"stage": 3, "param": "nvme", "optimizer": "nvme", "transport": "collective", "gradients": "disk"},
]
"""The first is what the others are compared with. Every stage with both transports, every offload mode with both."""

EXTRAS: dict[str, Case] = {
    "gpt": {"extras": ["between"]},
    "gpt-no-sync": {"family": "gpt", "extras": ["no-sync"], "accumulation": 3},
    "gpt-bf16": {"family": "gpt", "dtype": "bf16", "clip": None},
    "hf-llama": {"extras": ["between", "generate"]},
}
"""What some groups of runs do beside training; a group that is not here is its family."""

SKIPPING = {"skips-blocks", "branches"}
"""Ranks differ in the units that they gather: impossible where gathering is a collective."""

PER_GROUP = 2
"""Modes beside the first that each group runs in; they take turns, so that all of them are run at every world size."""

COVERING = {
    1: ["gpt", "mixture"],
    2: [
        "gpt", "gpt-reentrant", "gpt-nonreentrant", "gpt-no-sync", "gpt-bf16", "hf-llama", "hf-t5", "mixture",
        "adapters", "partly-frozen", "conv", "used-twice", "skips-blocks", "branches", "in-place-blocks",
    ],
    3: ["gpt", "mixture", "skips-blocks"],
    4: ["gpt"],
}  # fmt: skip
EVERY = [
    "gpt", "gpt-reentrant", "gpt-nonreentrant", "gpt-no-sync", "gpt-bf16", "hf-gpt2", "hf-gpt2-reentrant",
    "hf-gpt2-nonreentrant", "hf-llama", "hf-t5", "mixture", "sometimes-unused", "adapters", "partly-frozen", "conv",
    "used-twice", "skips-blocks", "branches", "in-place", "in-place-blocks", "nested-output", "block-lists",
    "recurrent",
]  # fmt: skip
NOT_FOR_DDP = {"gpt-no-sync", "gpt-bf16", "hf-gpt2-reentrant", "hf-gpt2-nonreentrant", "gpt-reentrant"}
"""Beside what DDP does not take: bf16 weights have no counterpart, and gradients that pile up sum in another order."""
GLOBAL = ["gpt", "mixture", "partly-frozen"]
"""Trained on the same micro-batches at every world size, 12 a step."""


def gathers_by_collective(mode: Case) -> bool:
    return mode["stage"] == 3 and (mode["transport"] == "collective" or mode.get("param") == "nvme")


_NAMING = ("stage", "param", "optimizer", "transport", "gradients")


def name_of(group: str, mode: Case) -> str:
    return " ".join([group, *(str(mode[key]) for key in _NAMING if key in mode)])


def cases_of(groups: list[str], world: int, folder: Path, per_group: int) -> Iterator[Case]:
    """For each group a run to compare with, the next `per_group` modes in turn, and DDP with a run that follows it."""
    turn = itertools.count()
    for group in groups:
        base = {"family": group, **EXTRAS.get(group, {})}
        modes = [mode for mode in MODES if not (group in SKIPPING and gathers_by_collective(mode))]
        chosen = modes[:1] + [modes[1 + next(turn) % (len(modes) - 1)] for _ in range(min(per_group, len(modes) - 1))]
        for mode in chosen:
            yield {**base, **mode, "name": name_of(group, mode), "group": group}
        if group in ("gpt", "mixture"):
            yield {**base, **modes[0], "name": f"{group} again", "group": group}
        if group not in NOT_FOR_DDP:
            trace = {"family": base["family"], "accumulation": 2}
            path = str(folder / f"{group}-{world}")
            yield {**trace, "plain": True, "record": path, "name": f"{group} DDP"}
            yield {**trace, **chosen[-1], "follow": path, "name": f"{group} follows DDP"}
    for family in GLOBAL:
        path = str(folder / f"{family}-global")
        own = {"record": path} if world == 1 else {"follow": path}
        mode = MODES[(world + len(family)) % len(MODES)]
        yield {"family": family, "total": 12, "steps": 2, **mode, **own, "name": f"{family} global"}


def run(world: int, cases: list[Case], folder: Path, timeout: float) -> list[dict[str, Any]]:
    """What rank 0 found in every case, after a look at the others."""
    path = folder / f"cases-{world}.json"
    path.write_text(json.dumps([{key: case[key] for key in case if key != "group"} for case in cases]))
    results = run_ranks(world, JOB, [str(path)], timeout=timeout)
    found = []
    for rank, result in enumerate(results):
        assert result.code == 0, f"rank {rank} of {world}:\n{result.out[-1000:]}\n{result.err[-3000:]}"
        lines = [line.removeprefix("CASE ") for line in result.out.splitlines() if line.startswith("CASE ")]
        found.append([json.loads(line) for line in lines])
        assert [each["name"] for each in found[-1]] == [case["name"] for case in cases]
    for number, case in enumerate(cases):
        for rank in range(1, world):
            for key in ("norms", "state", "live"):
                assert found[rank][number].get(key) == found[0][number].get(key), (
                    f"{case['name']}: {key} on rank {rank}"
                )
        found[0][number]["all_losses"] = [each[number]["losses"] for each in found]
        found[0][number]["all_held"] = [each[number]["held"] for each in found]
    return found[0]


def check_bits(cases: list[Case], found: list[dict[str, Any]]) -> None:
    firsts: dict[str, dict[str, Any]] = {}
    for case, result in zip(cases, found, strict=True):
        if "group" not in case:
            continue
        first = firsts.setdefault(case["group"], result)
        for key in ("all_losses", "norms", "aside", "state", "live", "buffers", "skipped"):
            assert result[key] == first[key], f"{result['name']} and {first['name']} differ in {key}"
        assert result["skipped"] == 0
        assert len(set(result["norms"])) == len(result["norms"]), "every step trains"


def check_bounds(cases: list[Case], found: list[dict[str, Any]]) -> None:
    for case, result in zip(cases, found, strict=True):
        if "follow" not in case:
            continue
        worst = dict(result["worst"])
        assert worst.pop("losses") == 0.0, result["name"]
        # A bound of a hundredth of a step, in the median element, tells a wrong sum from a reordered one.
        assert worst.pop("looseness") < 1e-2, result["name"]
        assert max(worst.values()) <= 1.0, (result["name"], worst)


def check_nothing_is_left(found: list[dict[str, Any]]) -> None:
    # torch and the collectives start threads and open files at their first use, all of it in the first few runs.
    steady = found[len(found) // 2]
    for result in found:
        assert result["scratch"] == 0, result["name"]
        for held in result["all_held"]:
            assert (held["memfds"], held["mapped"]) == (0, 0), result["name"]
    for held, before in zip(found[-1]["all_held"], steady["all_held"], strict=True):
        assert held["descriptors"] <= before["descriptors"], (held, before)
        assert held["threads"] <= before["threads"], (held, before)
        assert held["python_threads"] == before["python_threads"] == 1


def check(world: int, groups: list[str], folder: Path, per_group: int, timeout: float) -> None:
    cases = list(cases_of(groups, world, folder, per_group))
    found = run(world, cases, folder, timeout)
    check_bits(cases, found)
    check_bounds(cases, found)
    check_nothing_is_left(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where one rank has left the traces that the other world sizes follow."""
    folder = tmp_path_factory.mktemp("equivalence")
    check(1, COVERING[1], folder, PER_GROUP, timeout=250)
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_train_alike_in_every_way_of_running(world, folder):
    """Catches: a sum in another order than that of the ranks, a shard offset that is off, an old weight that is used
    after a step, a micro-batch or a parameter that is left out, memory or files that stay."""
    check(world, COVERING[world], folder, PER_GROUP, timeout=500)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_full_matrix(tmp_path):
    """Every family in every mode at every world size."""
    for world in (1, 2, 3, 4):
        check(world, EVERY, tmp_path, len(MODES), timeout=1800)

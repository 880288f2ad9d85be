"""Experts that run only where tokens go to them, over two ranks with tokens of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import PACKAGE, TESTS, run_ranks
from routed_models import train_plainly
from routed_ranks import STEPS, feed

HERE = Path(__file__).parent

# fp32 beside float64, as in one process, with gradients summed over two ranks: 1e-4 of lr = 1e-2 a step.
TOLERANCE = {"rtol": 0, "atol": 1e-6 * STEPS}

CASES: list[dict[str, Any]] = [
    {"name": "nvme", "home": "nvme", "transport": "collective"},
    {"name": "recomputed", "home": "nvme", "transport": "collective", "recomputes": True},
    {"name": "shared", "home": "nvme", "transport": "shared_memory"},
    {"name": "host", "home": "cpu", "transport": "shared_memory"},
    {"name": "stage 1", "home": "cpu", "stage": 1, "transport": "collective"},
    {"name": "stage 0", "home": "cpu", "stage": 0, "transport": "auto"},
]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routed")
    job = folder / "cases.json"
    job.write_text(json.dumps(CASES))
    env = {"PYTHONPATH": f"{PACKAGE}:{TESTS}:{HERE}"}
    results = run_ranks(2, HERE / "routed_ranks.py", [str(job)], env=env, timeout=120)
    found: dict[str, list[dict[str, Any]]] = {case["name"]: [] for case in CASES}
    for result in results:
        assert result.code == 0, result.err
        for line in result.out.splitlines():
            if line.startswith("CASE "):
                one = json.loads(line.removeprefix("CASE "))
                found[one["name"]].append(one)
    return folder, found


@pytest.fixture(scope="module")
def plain():
    steps = [list(each) for each in zip(feed(0), feed(1), strict=True)]
    return train_plainly(steps, leave_out=True)


@pytest.mark.parametrize("name", [case["name"] for case in CASES])
def test_two_ranks_leave_out_what_neither_has_tokens_for(two, plain, name):
    """Catches: a rank that gathers an expert alone and waits for ever, an expert with tokens on one rank that the other
    does not update, and one without any that decays."""
    folder, found = two
    model, losses, _ = plain
    for rank, one in enumerate(found[name]):
        assert one["losses"][:STEPS] == pytest.approx(losses[rank::2], rel=1e-5)
    weights = torch.load(folder / f"{name}.pt")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(weights[key].double(), value, **TOLERANCE, msg=lambda line, key=key: f"{key} {line}")


def test_the_disk_has_only_experts_with_tokens_on_any_rank(two, plain):
    """Catches: state that is read because another rank's gradient of it is zero."""
    _, found = two
    _, _, used = plain
    for moved, having in zip(found["nvme"][0]["moved"], used, strict=True):
        experts = {f"layers.{layer}.moe.deepspeed_moe.experts.deepspeed_experts.{number}" for layer, number in having}
        assert {name for name in moved if ".deepspeed_experts." in name} == experts

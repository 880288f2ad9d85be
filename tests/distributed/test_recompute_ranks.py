"""Blocks whose activations are computed again in backward, over two ranks: the bits of ranks that keep them.

Catches: weights that are exchanged for the recomputation on one rank alone, which would wait for good.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import PACKAGE, TESTS, run_ranks

HERE = Path(__file__).parent

CASES: list[dict[str, Any]] = [
    {"family": "gpt", "transport": "shared_memory", "param": "nvme", "asked": "all"},
    {"family": "partly-frozen", "transport": "collective", "asked": 3},
    {"family": "used-twice", "transport": "collective", "asked": 2},
]


@pytest.mark.timeout(120)
def test_two_ranks(tmp_path):
    job, cases = tmp_path / "cases.json", []
    for number, case in enumerate(CASES):
        rest = {name: value for name, value in case.items() if name not in ("transport", "asked")}
        for asked in ("none", case["asked"]):
            own = {"transport": case["transport"], "threads": 1, "recompute": asked}
            cases.append({**rest, "name": f"{number} {asked}", "steps": 2, "config": {"zeroxide": own}})
    job.write_text(json.dumps(cases))
    results = run_ranks(
        2, HERE / "training.py", [str(job)], env={"PYTHONPATH": f"{PACKAGE}:{TESTS}:{HERE}"}, timeout=90
    )
    for result in results:
        assert result.code == 0, result.err
        lines = [line.removeprefix("CASE ") for line in result.out.splitlines() if line.startswith("CASE ")]
        found = {each["name"]: each for each in map(json.loads, lines)}
        assert len(found) == len(cases)
        for number, case in enumerate(CASES):
            plain, other = found[f"{number} none"], found[f"{number} {case['asked']}"]
            for what in ("losses", "norms", "state", "live", "sent"):
                assert other[what] == plain[what], (case, what)

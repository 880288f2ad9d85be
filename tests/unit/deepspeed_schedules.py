"""Writes down the rates and momenta of DeepSpeed's own schedules: run where DeepSpeed is installed.

    DS_ACCELERATOR=cpu python tests/unit/deepspeed_schedules.py > tests/unit/deepspeed_schedules.json

Of each case: the class, its arguments, and [rate, first beta, second beta] of both parameter groups at every optimizer
step.
"""

from __future__ import annotations

import json
from typing import Any

CASES: list[tuple[str, dict[str, Any]]] = [
    ("LRRangeTest", {}),
    ("LRRangeTest", {"lr_range_test_min_lr": [0.1, 0.2], "lr_range_test_step_size": 4, "lr_range_test_step_rate": 0.5}),
    ("LRRangeTest", {"lr_range_test_step_size": 3, "lr_range_test_staircase": True}),
    ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 4}),
    (
        "OneCycle",
        {
            "cycle_min_lr": [0.1, 0.2],
            "cycle_max_lr": [0.5, 0.4],
            "cycle_first_step_size": 7,
            "cycle_second_step_size": 3,
            "decay_lr_rate": 0.5,
            "decay_step_size": 2,
            "decay_mom_rate": 0.01,
        },
    ),
    (
        "OneCycle",
        {
            "cycle_min_lr": 0.1,
            "cycle_max_lr": 0.5,
            "cycle_first_step_size": 9,
            "cycle_second_step_size": 6,
            "cycle_first_stair_count": 3,
            "cycle_second_stair_count": 2,
            "cycle_momentum": False,
        },
    ),
    (
        "OneCycle",
        {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 22, "cycle_first_stair_count": 22},
    ),
    ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 3, "cycle_second_step_size": 0}),
    (
        "OneCycle",
        {
            "cycle_min_lr": 0.1,
            "cycle_max_lr": 0.5,
            "cycle_first_step_size": 2.5,
            "cycle_min_mom": [0.5, 0.6],
            "cycle_max_mom": [0.95, 0.9],
        },
    ),
]
STEPS = 24


def groups(optimizer: Any) -> list[list[float]]:
    """[rate, first beta, second beta] of each parameter group."""
    return [[float(group["lr"]), *map(float, group["betas"])] for group in optimizer.param_groups]


def main() -> None:
    """Prints them."""
    import torch
    from deepspeed.runtime import lr_schedules

    found = []
    for name, arguments in CASES:
        params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        optimizer = torch.optim.AdamW([{"params": [params[0]]}, {"params": [params[1]], "lr": 2e-3}], lr=1e-3)
        schedule = getattr(lr_schedules, name)(optimizer, **arguments)
        seen = []
        for _ in range(STEPS):
            seen.append(groups(optimizer))
            schedule.step()
        found.append(json.dumps({"name": name, "arguments": arguments, "seen": seen}))
    print("[\n" + ",\n".join(found) + "\n]")


if __name__ == "__main__":
    main()

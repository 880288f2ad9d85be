"""What each rank of the test of rounding formats runs: trains from one step to another; loads before, saves after."""

import sys
from pathlib import Path

import torch
from plain_rules import Given

import zeroxide

GROUPS = {
    "first": ("AdamW", "compact", ("exp_avg", "exp_avg_sq")),
    "second": ("Lion", "split-bf16", ("exp_avg",)),
    "third": ("SGD", "compact", ("momentum_buffer",)),
}
NUMEL = 5003


def main(folder, first, last, stage):
    folder, first, last = Path(folder), int(first), int(last)
    torch.set_num_threads(1)
    model = Given(tuple(GROUPS), numel=NUMEL)
    momentum = {"third": {"momentum": 0.9}}
    groups = [
        {
            "params": [layer[name] for layer in model.layers],
            "optimizer": kind,
            "state_format": fmt,
            **momentum.get(name, {}),
        }
        for name, (kind, fmt, _) in GROUPS.items()
    ]
    scratch = f"nvme:{folder / 'scratch'}"
    engine, *_ = zeroxide.initialize(
        model=model,
        model_parameters=groups,
        config={"zero_optimization": {"stage": int(stage)}, "zeroxide": {"threads": 1}, "gradient_clipping": 0},
        dtype="bf16",
        lr=1e-3,
        **({"offload": scratch} if int(stage) == 3 else {"offload_optimizer": "cpu"}),
    )
    if first:
        with torch.no_grad():
            # What the checkpoint does not bring would show.
            for layer in model.layers:
                for name in GROUPS:
                    zeroxide.safe_set_full_fp32_param(layer[name], torch.full((NUMEL,), 7.0))
        engine.load_checkpoint(folder / "saved")
    for at in range(first, last):
        engine.backward(engine(at))
        engine.step()
    engine.save_checkpoint(folder / "saved")
    values = {}
    for number, layer in enumerate(model.layers):
        for name, (_, _, states) in GROUPS.items():
            values[number, name, "weight"] = zeroxide.safe_get_full_fp32_param(layer[name])
            for key in states:
                values[number, name, key] = zeroxide.safe_get_full_optimizer_state(layer[name], key)
    if engine.global_rank == 0:
        torch.save(values, folder / "values.pt")
    engine.destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])

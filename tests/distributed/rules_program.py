"""What each rank of the test of mixed rules runs: trains from one step to another, loads before and saves after."""

import sys
from pathlib import Path

import torch
from plain_rules import Given

import zeroxide

LION = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
ADAGRAD = {"lr": 0.05, "lr_decay": 0.01, "weight_decay": 0.01, "initial_accumulator_value": 0.25, "eps": 1e-10}
RULES = {"first": ("Lion", "fp32", LION), "second": ("Adagrad", "split", ADAGRAD)}
STATES = {"first": "exp_avg", "second": "sum"}


def main(folder, first, last, stage):
    folder, first, last = Path(folder), int(first), int(last)
    torch.set_num_threads(1)
    model = Given(tuple(RULES), numel=5003)
    groups = [
        {"params": [layer[name] for layer in model.layers], "optimizer": kind, "state_format": fmt, **hyperparameters}
        for name, (kind, fmt, hyperparameters) in RULES.items()
    ]
    scratch = f"nvme:{folder / 'scratch'}"
    engine, *_ = zeroxide.initialize(
        model=model,
        model_parameters=groups,
        config={"zero_optimization": {"stage": int(stage)}, "zeroxide": {"threads": 1}, "gradient_clipping": 0},
        dtype="bf16",
        lr=1e-3,
        **({"offload": scratch} if int(stage) == 3 else {"offload_optimizer": scratch}),
    )
    if first:
        with torch.no_grad():
            # What the checkpoint does not bring would show.
            for layer in model.layers:
                for name in RULES:
                    zeroxide.safe_set_full_fp32_param(layer[name], torch.full((5003,), 7.0))
        engine.load_checkpoint(folder / "saved")
    for at in range(first, last):
        engine.backward(engine(at))
        engine.step()
    engine.save_checkpoint(folder / "saved")
    values = {
        (number, name): (
            zeroxide.safe_get_full_fp32_param(layer[name]),
            zeroxide.safe_get_full_optimizer_state(layer[name], STATES[name]),
        )
        for number, layer in enumerate(model.layers)
        for name in RULES
    }
    if engine.global_rank == 0:
        torch.save(values, folder / "values.pt")
    engine.destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])

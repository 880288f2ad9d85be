"""Writes universal checkpoints as DeepSpeed 0.19.8 lays them out, without DeepSpeed: the same files, keys and shapes.

From stages 1 and 2 a part is a dict with the tensor in its shape, and every parameter has its step; from stage 3 it is
the flat tensor alone, and the step is with the optimizer (deepspeed/checkpoint/ds_to_universal.py).
"""

from collections import OrderedDict

import torch
from deepspeed_files import Classes

FILES = {"weights": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def write(folder, written, *, stage, steps=3, world=2):
    """Writes `folder/global_step<steps>` and `latest_universal`."""
    target = folder / f"global_step{steps}"
    (target / "zero").mkdir(parents=True)
    (folder / "latest_universal").write_text(target.name)
    for (name, part), value in written.values.items():
        path = target / "zero" / name
        path.mkdir(exist_ok=True)
        flat = value.reshape(-1).clone()
        torch.save(flat if stage == 3 else {"cat_dim": 0, "param": value}, path / f"{FILES[part]}.pt")
        if stage < 3:
            torch.save(torch.tensor(float(steps)), path / "step.pt")
    if stage < 3:
        # What is in the module and no optimizer has is there as well, in fp32.
        for name, value in (written.frozen | written.buffers).items():
            (target / "zero" / name).mkdir()
            torch.save({"param": value.float()}, target / "zero" / name / "fp32.pt")
    groups = [
        {"lr": 0.01 * (g + 1), "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1 * g, "params": [g]}
        for g in range(len(written.groups))
    ]
    with Classes() as classes:
        state = {"loss_scaler": classes.LossScaler(1.0), "overflow": False, "ds_version": "0.19.8"}
        state |= {"zero_stage": classes.ZeroStageEnum(stage), "param_groups": groups}
        if stage == 3:
            inner = {g: {"step": torch.tensor(float(steps))} for g in range(len(groups))}
            state["optimizer_state_dict"] = {"state": inner, "param_groups": groups}
        torch.save(state, target / "zero" / "optimizer_state.pt")
        for rank in range(world if stage == 3 else 1):
            name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
            torch.save(_model_states(written, stage, steps, world, rank), target / name)
    return target


def _model_states(written, stage, steps, world, rank):
    def part_of(value):
        flat = value.reshape(-1)
        padded = torch.cat([flat, torch.full((-flat.numel() % world,), 55.0, dtype=flat.dtype)])
        return padded.view(world, -1)[rank].clone()

    module = OrderedDict(written.buffers)
    for name in (name for names in written.groups for name in names):
        value = written.values[name, "weights"].bfloat16()
        module[name] = torch.empty(0, dtype=torch.bfloat16) if stage == 3 else value
    module.update(written.frozen if stage < 3 else {})
    frozen = {name: part_of(value) if stage == 3 else value for name, value in written.frozen.items()}
    return {
        "module": module,
        "buffer_names": list(written.buffers),
        "optimizer": None,
        "param_shapes": [
            OrderedDict((name, written.values[name, "weights"].shape) for name in names) for names in written.groups
        ],
        "frozen_param_shapes": OrderedDict((name, value.shape) for name, value in written.frozen.items()),
        "frozen_param_fragments": OrderedDict(frozen),
        "shared_params": dict(written.shared),
        "lr_scheduler": {"last_batch_iteration": steps - 1},
        "skipped_steps": 1,
        "global_steps": steps,
        "global_samples": 8 * steps,
        "dp_world_size": world,
        "mp_world_size": 1,
        "ds_config": {"scheduler": {"type": "WarmupLR"}, "gradient_accumulation_steps": 2},
        "ds_version": "0.19.8",
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
        "epoch": 1.5,
    }

"""Writes checkpoints as DeepSpeed lays them out, without DeepSpeed: the same files, keys, flat tensors and paddings.

The order of steps is that of the optimizers (concatenate, pad, split), not that of the reader under test.
"""

import sys
import types
from collections import OrderedDict
from dataclasses import dataclass

import torch

PARTS = ("weights", "exp_avg", "exp_avg_sq")


@dataclass
class Written:
    """What was put into a checkpoint: fp32 tensors by (name, part), in groups of names, and the rest."""

    groups: list
    values: dict
    frozen: dict
    buffers: dict
    shared: dict


def made_up(seed=0):
    """Parameters of odd sizes in two groups, frozen ones, buffers, and a tied pair."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embed.weight": (50, 3), "blocks.0.up.weight": (7, 5), "blocks.0.scale": (), "blocks.1.up.weight": (11, 5),
        "blocks.0.up.bias": (7,), "norm.weight": (1,), "blocks.1.up.bias": (13,),
    }  # fmt: skip
    groups = [list(shapes)[:4], list(shapes)[4:]]
    values = {(name, part): torch.randn(shape, generator=generator) for name, shape in shapes.items() for part in PARTS}
    frozen = {
        "frozen.weight": torch.randn(9, 3, generator=generator).bfloat16(),
        "frozen.bias": torch.randn(5, generator=generator).bfloat16(),
    }
    buffers = {"mask": torch.tensor([True, False]), "running": torch.randn(4, generator=generator)}
    return Written(groups, values, frozen, buffers, {"head.weight": "embed.weight"})


class Classes:
    """Classes under the names of DeepSpeed's, importable only while files are written."""

    NAMES = (
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
        ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
        ("deepspeed.utils.tensor_fragment", "fragment_address"),
    )

    def __enter__(self):
        for module, name in self.NAMES:
            parts = module.split(".")
            for end in range(1, len(parts) + 1):
                path = ".".join(parts[:end])
                sys.modules.setdefault(path, types.ModuleType(path))

            def reduce(self):
                return (type(self), self.given)

            def init(self, *given):
                self.given = given

            made = type(name, (), {"__init__": init, "__reduce__": reduce, "__module__": module})
            if name == "LossScaler":
                del made.__reduce__
            setattr(sys.modules[module], name, made)
            setattr(self, name, made)
        return self

    def __exit__(self, *error):
        for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
            del sys.modules[name]


def flat_of(written, names, part, paddings):
    pieces = []
    for name, padding in zip(names, paddings, strict=True):
        pieces += [written.values[name, part].reshape(-1), torch.full((padding,), 99.0)]
    return torch.cat(pieces)


def write(folder, written, *, stage, world, steps=3, prefix="bf16_", aligned=0, sub_groups=1, extra=None):
    """Writes `folder/global_step<steps>` and `latest`. `aligned` pads every parameter to a multiple (stages 1, 2)."""
    target = folder / f"global_step{steps}"
    target.mkdir(parents=True)
    (folder / "latest").write_text(target.name)
    hyper = [
        {"lr": 0.01 * (g + 1), "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1 * g, "amsgrad": False}
        for g in (0, 1)
    ]
    with Classes() as classes:
        states, shapes, fragments = (_stage_3 if stage == 3 else _stages_1_and_2)(
            classes, written, hyper, world=world, steps=steps, aligned=aligned, sub_groups=sub_groups, stage=stage
        )
        module = OrderedDict(written.buffers)
        for names in written.groups:
            for name in names:
                value = written.values[name, "weights"].bfloat16()
                module[name] = torch.empty(0, dtype=torch.bfloat16) if stage == 3 else value
        module.update(written.frozen if stage < 3 else {})
        frozen = {name: value.shape for name, value in written.frozen.items()} if stage > 1 else None
        for rank in range(world):
            torch.save(
                {"optimizer_state_dict": states[rank], "ds_version": "0.19.8"},
                target / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            )
            name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
            if rank and stage < 3:
                continue
            torch.save(
                {
                    "module": module,
                    "buffer_names": list(written.buffers),
                    "optimizer": None,
                    "param_shapes": shapes,
                    "frozen_param_shapes": None if frozen is None else OrderedDict(frozen),
                    "shared_params": dict(written.shared),
                    "frozen_param_fragments": None if frozen is None else OrderedDict(fragments[rank]),
                    "lr_scheduler": {"last_batch_iteration": steps - 1},
                    "skipped_steps": 1,
                    "global_steps": steps,
                    "global_samples": 8 * steps,
                    "dp_world_size": world,
                    "mp_world_size": 1,
                    "ds_config": {"scheduler": {"type": "WarmupLR"}, "gradient_accumulation_steps": 2},
                    "ds_version": "0.19.8",
                    "epoch": 1.5,
                    **(extra or {}),
                },
                target / name,
            )
    return target


def _state(steps, **moments):
    return {"step": torch.tensor(float(steps)), **moments} if steps else {}


def _stages_1_and_2(classes, written, hyper, *, world, steps, aligned, stage, **_):
    shapes = [OrderedDict((name, written.values[name, "weights"].shape) for name in names) for names in written.groups]
    paddings = [
        [-written.values[name, "weights"].numel() % aligned if aligned else 0 for name in names]
        for names in written.groups
    ]
    split = {}
    for part in PARTS:
        for group, names in enumerate(written.groups):
            flat = flat_of(written, names, part, paddings[group])
            padded = torch.cat([flat, torch.full((-flat.numel() % (2 * world),), 77.0)])
            lean = padded.numel() - flat.numel()
            split[part, group] = list(padded.chunk(world)), lean
    states = []
    for rank in range(world):
        weights = []
        for group in range(len(written.groups)):
            chunks, padding = split["weights", group]
            # Padding is at the end of all ranks together.
            end = max(0, min(chunks[rank].numel(), chunks[rank].numel() * (world - rank) - padding))
            weights.append(chunks[rank][:end].clone() if end else chunks[rank][:0].clone())
        moments = {
            group: _state(steps, **{part: split[part, group][0][rank].clone() for part in PARTS[1:]})
            for group in range(len(written.groups))
        }
        states.append(
            {
                "loss_scaler": classes.LossScaler(1.0),
                "dynamic_loss_scale": False,
                "overflow": False,
                "clip_grad": 1.0,
                "base_optimizer_state": {
                    "state": {group: state for group, state in moments.items() if state},
                    "param_groups": [{**each, "params": [group]} for group, each in enumerate(hyper)],
                },
                "single_partition_of_fp32_groups": weights,
                "zero_stage": classes.ZeroStageEnum(stage),
                "group_paddings": [split["weights", group][1] if rank == world - 1 else 0 for group in (0, 1)],
                "param_alignment_paddings": paddings,
                "partition_count": [world, world],
                "param_slice_mappings": [OrderedDict(a=classes.fragment_address(3, 0))],
            }
        )
    return states, shapes, [written.frozen] * world


def _stage_3(classes, written, hyper, *, world, steps, sub_groups, **_):
    names = []
    for group, members in enumerate(written.groups):
        cut = max(1, -(-len(members) // sub_groups))
        names += [(group, members[at : at + cut]) for at in range(0, len(members), cut)]
    shapes = [OrderedDict((name, written.values[name, "weights"].shape) for name in members) for _, members in names]

    def part_of(value, rank):
        flat = value.reshape(-1)
        padded = torch.cat([flat, torch.full((-flat.numel() % world,), 55.0, dtype=flat.dtype)])
        return padded.view(world, -1)[rank].clone()

    states = []
    for rank in range(world):
        flats = {
            part: [torch.cat([part_of(written.values[name, part], rank) for name in members]) for _, members in names]
            for part in PARTS
        }
        states.append(
            {
                "zero_stage": classes.ZeroStageEnum(3),
                "loss_scaler": classes.LossScaler(1.0),
                "dynamic_loss_scale": False,
                "overflow": False,
                "partition_count": world,
                "optimizer_state_dict": {
                    "state": {
                        number: _state(steps, exp_avg=flats["exp_avg"][number], exp_avg_sq=flats["exp_avg_sq"][number])
                        for number in range(len(names))
                        if steps
                    },
                    "param_groups": [
                        {**each, "params": [number for number, (of, _) in enumerate(names) if of == group]}
                        for group, each in enumerate(hyper)
                    ],
                },
                "fp32_flat_groups": flats["weights"],
            }
        )
    fragments = [{name: part_of(value, rank) for name, value in written.frozen.items()} for rank in range(world)]
    return states, shapes, fragments

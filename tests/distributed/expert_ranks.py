"""A job that trains a model of experts many times in the same processes, as the cases in its arguments say.

Every rank prints a line "CASE {...}" for each: losses and norms, and on rank 0 digests of the whole model, of its state
as a checkpoint has it, and what else the case asks for.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from expert_models import batches, build, loss_of

import zeroxide
from zeroxide.errors import ModelError


def config_of(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": case["stage"]}
    if case.get("nvme"):
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": str(folder / "nvme")}
        if case["stage"] == 3:
            zero["offload_param"] = {"device": "nvme", "nvme_path": str(folder / "nvme")}
    own = {"transport": "collective", "threads": 1, "tile_bytes": 16384, "staging_bytes": 1 << 20}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": zero,
        "bf16": {"enabled": case.get("dtype") == "bf16"},
        "gradient_clipping": 0.5,
        "steps_per_print": None,
        "zeroxide": {**own, **case.get("own", {})},
        **(autoep(case["ep"]) if case["family"] != "moe" else {}),
        **case.get("config", {}),
    }


def autoep(size: int) -> dict[str, Any]:
    return {"expert_parallel": {"enabled": True, "autoep_size": size}}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def refused(engine: Any) -> list[str]:
    """What an engine says of calls that experts over ranks do not go with."""
    lines = []
    expert = next(param for name, param in engine.module.named_parameters() if "experts" in name)
    for call in (
        lambda: zeroxide.zero.GatheredParameters([expert], modifier_rank=0).__enter__(),
        lambda: engine.load_module_state_dict({}),
    ):
        try:
            call()
        except ModelError as error:
            lines.append(str(error))
    with zeroxide.zero.GatheredParameters([expert]):
        assert expert.numel() > 0
    return lines


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    (folder / "nvme").mkdir(exist_ok=True)
    model = build(case["family"], case.get("ep", 1))
    if case.get("recomputes"):
        model.train()
        model.gradient_checkpointing_enable()
    if rank:
        # Rank 0's weights are those of all.
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.5)
    engine, *_ = zeroxide.initialize(model=model, config=config_of(case, folder))
    found: dict[str, Any] = {"losses": [], "norms": [], "units": [unit.name for unit in engine.parts.units]}
    if case.get("load"):
        engine.load_checkpoint(folder / case["load"])
    for step in range(case.get("first", 0), case.get("first", 0) + case.get("steps", 3)):
        for micro in range(2):
            loss = loss_of(engine, batches(step, rank, micro, world))
            engine.backward(loss)
            engine.step()
            found["losses"].append(float(loss))
        found["norms"].append(float(engine.get_global_grad_norm()))
    found["held"] = sum(unit.flat.nbytes for unit in engine.parts.units)
    shown = engine.module.state_dict()
    found["shown"] = digest({name: value.float() for name, value in shown.items()})
    full = engine.module_state_dict()
    if rank == 0:
        found["model"] = digest({name: value.float() for name, value in full.items()})
        found["names"] = sorted(full)
        torch.save({name: value.float() for name, value in full.items()}, folder / f"{case['name']}.pt")
    found["refused"] = refused(engine) if case.get("refused") else []
    if case.get("save"):
        engine.save_checkpoint(folder / case["save"])
        engine.save_16bit_model(folder / f"{case['save']}.model")
    engine.destroy()
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder / "nvme")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    zeroxide.init_distributed(verbose=False)
    for each in json.loads(Path(sys.argv[1]).read_text()):
        print("CASE " + json.dumps({"name": each["name"], **run(each, Path(sys.argv[1]).parent)}), flush=True)
        dist.barrier()

"""A rank that trains pipelines one after the other, as the cases in the file named by its argument say.

Prints "CASE {...}" for each: what it found, and where it has put its weights.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pipeline_models import SAMPLES, batch, causal, layers, loss_fn

import zeroxide
from zeroxide import safe_get_full_fp32_param, safe_get_full_optimizer_state
from zeroxide.parallel.pipe import PipelineModule, message
from zeroxide.zero import activations_on_disk


def config_of(case: dict[str, Any], folder: Path, replicas: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": case["stage"]}
    for part in ("param", "optimizer"):
        home = case.get(part, "none")
        if home != "none":
            zero[f"offload_{part}"] = {"device": home} | ({"nvme_path": str(folder)} if home == "nvme" else {})
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": SAMPLES,
        "gradient_accumulation_steps": case["numbers"] // replicas,
        "optimizer": {"type": "AdamW", "params": {"lr": case["lr"], "weight_decay": 0.01}},
        "gradient_clipping": case["clip"],
        "zero_optimization": zero,
        **case.get("config", {}),
    }
    return config


def model_of(case: dict[str, Any], config: dict[str, Any]) -> Any:
    how = {name: case[name] for name in ("partition_method", "schedule", "stages_per_rank") if name in case}
    if case["kind"].endswith("layers"):
        interval = case.get("interval", 0)
        return PipelineModule(
            layers(case["kind"] == "tied layers"),
            num_stages=case["pp"],
            loss_fn=loss_fn,
            seed_layers=True,
            activation_checkpoint_interval=interval,
            **how,
        )
    model = causal(case["kind"])
    if case.get("by_mesh"):
        config["zeroxide"] = {"mesh": {"pp": case["pp"]}}
        return model
    return PipelineModule.from_model(model, case["pp"], **how)


def train(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    replicas = world // case["pp"]
    config = config_of(case, folder, replicas)
    model, more = model_of(case, config), {}
    # Tensors of these models are small.
    activations_on_disk.MIN_BYTES = 256
    message.TIED_PART = case.get("tied_part", message.TIED_PART)
    if case.get("optimizer_of_all"):
        # As a script makes it, before anything is cut.
        del config["optimizer"]
        more["optimizer"] = torch.optim.AdamW(model.parameters(), lr=case["lr"], weight_decay=0.01)
    engine, _, _, _ = zeroxide.initialize(model=model, config=config, **more)
    mine = [number for number in range(case["numbers"]) if number % replicas == rank % replicas]
    losses, norms = [], []
    for step in range(case["steps"]):
        if case.get("save_at") == step:
            engine.save_checkpoint(case["checkpoint"], tag="saved")
        if case.get("load_at") == step:
            engine.load_checkpoint(case["checkpoint"], tag="saved")
        if step < case.get("first", 0):
            continue
        losses.append(engine.train_batch(iter([batch(case["kind"], step, number) for number in mine])).item())
        norms.append(float(engine.get_global_grad_norm()))
    evaluated = engine.eval_batch(iter([batch(case["kind"], case["steps"], number) for number in mine]))
    state = {}
    for name, param in engine.module.named_parameters():
        parts = [safe_get_full_fp32_param(param)]
        parts += [safe_get_full_optimizer_state(param, key) for key in ("exp_avg", "exp_avg_sq")]
        state[name] = torch.stack(parts)
    path = folder / f"{case['name']}-{rank}.pt"
    torch.save({name: values[0] for name, values in state.items()}, path)
    found = {
        "losses": losses,
        "norms": norms,
        "evaluated": evaluated.item(),
        "digests": {name: hashlib.sha256(values.numpy().tobytes()).hexdigest() for name, values in state.items()},
        "weights": str(path),
        "ends": [engine.is_first_stage(), engine.is_last_stage()],
        "units": [unit.name for unit in engine.parts.units],
        "sent": engine.pipeline_bytes_sent(),
        "stored": 0 if engine.parts.activations is None else engine.parts.activations.file.written,
    }
    engine.destroy()
    gc.collect()
    found["threads"] = sorted(each.name for each in threading.enumerate() if each.name.startswith("zeroxide"))
    return found


def main() -> None:
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    zeroxide.init_distributed(verbose=False)
    for case in cases:
        print("CASE", json.dumps(train(case, Path(sys.argv[1]).parent)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

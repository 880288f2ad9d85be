"""Trains over tensor-parallel ranks as the cases in the file named by its argument say; see `main`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensor_models import ADAM, CLIP, STEPS, batch, build, train_plain

import zeroxide
from zeroxide.engine.engine import Engine
from zeroxide.parallel.tensor import shard_of


def initialize(case: dict[str, Any], folder: Path) -> Engine:
    stage, home = case["stage"], case.get("home", "none")
    device = {"device": home, **({"nvme_path": str(folder)} if home == "nvme" else {})}
    zero = {"stage": stage}
    if stage:
        zero["offload_optimizer"] = device
    if stage == 3:
        zero["offload_param"] = device
    config = {
        "optimizer": {"type": "AdamW", "params": ADAM},
        "gradient_clipping": CLIP,
        "bf16": {"enabled": case.get("bf16", False)},
        "zero_optimization": zero,
        "tensor_parallel": {"autotp_size": case["tp"], **case.get("tensor_parallel", {})},
        "zeroxide": {
            "threads": 1,
            "transport": case.get("transport", "auto"),
            "gradients": case.get("gradients", "auto"),
        },
        "steps_per_print": None,
    }
    model = build(case["family"])
    if dist.get_rank():
        # Rank 0's weights count.
        with torch.no_grad():
            for param in model.parameters():
                param.add_(1.0)
    return zeroxide.initialize(model=model, config=config)[0]


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: zeroxide.safe_get_full_fp32_param(param) for name, param in engine.module.named_parameters()}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name, each in tensors.items():
        raw = each.contiguous().view(-1).view(torch.uint8)
        total.update(name.encode() + raw.numpy().tobytes())
    return total.hexdigest()[:16]


def own_copies(engine: Engine) -> str:
    """The digest of what is not cut, as this rank has it."""
    found = {}
    for name, param in engine.module.named_parameters():
        if shard_of(param) is None:
            with zeroxide.zero.GatheredParameters([param]):
                found[name] = param.detach().clone()
    return digest(found)


def train(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Losses are those of all replicas, norms and weights what every rank has."""
    engine = initialize(case, folder)
    replicas = dist.get_world_size() // case["tp"]
    replica = dist.get_rank() // case["tp"]
    found: dict[str, Any] = {"losses": [], "norms": [], "digests": {}}
    try:
        for step in range(case["steps"]):
            loss = engine(**batch(step * replicas + replica)).loss
            engine.backward(loss)
            engine.step()
            mean = loss.detach().double() / dist.get_world_size()
            dist.all_reduce(mean)
            found["losses"].append(mean.item())
            found["norms"].append(float(engine.get_global_grad_norm()))
            if step + 1 in case["look"]:
                found["digests"][step + 1] = digest(weights(engine))
        found["copies"] = own_copies(engine)
        if case["steps"] == STEPS:
            after = weights(engine)
            found |= compare(case, after, replicas) if dist.get_rank() == 0 else {}
        dist.barrier()
    finally:
        engine.destroy()
    return found


def compare(case: dict[str, Any], got: dict[str, torch.Tensor], replicas: int) -> dict[str, Any]:
    """How far the weights are from those of double precision, and how far plain PyTorch's are in single."""
    exact = train_plain(case["family"], replicas, torch.float64)
    plain = train_plain(case["family"], replicas, torch.float32)
    assert got.keys() == exact["weights"].keys()
    far = {name: (each.double() - exact["weights"][name]).abs().max().item() for name, each in got.items()}
    usual = {
        name: (each.double() - exact["weights"][name]).abs().max().item() for name, each in plain["weights"].items()
    }
    moved = max(
        (each - exact["weights"][name].float()).abs().max().item()
        for name, each in build(case["family"]).named_parameters()
    )
    return {
        "far": max(far.values()),
        "usual": max(usual.values()),
        "moved": moved,
        "plain_losses": plain["losses"],
        "exact_norms": exact["norms"],
    }


def main() -> None:
    """Prints a line "CASE {...}" for each case. A case has `family`, `tp`, `stage`, `steps`, and after which steps to
    `look` at the weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(os.environ["JOB_FOLDER"])
    for case in json.loads(Path(sys.argv[1]).read_text()):
        print("CASE", json.dumps(train(case, folder)), flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

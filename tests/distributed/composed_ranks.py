"""A rank that trains one model in several compositions of axes, as the cases in the file named by its argument say.

Prints "CASE {...}" for each. What it trained is in a checkpoint of the undivided model, one for each case.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from composed_models import IGNORED, SAMPLES, batch, build

import zeroxide
from zeroxide import safe_get_local_fp32_param, safe_get_local_optimizer_state
from zeroxide.config import Mesh
from zeroxide.distributed import ProcessMesh
from zeroxide.parallel.pipe.module import PipelineModule
from zeroxide.parallel.sequence import (
    UlyssesSPAttentionHF,
    average_over_tokens,
    destroy_sequence_parallel,
    initialize_sequence_parallel,
    shard_batch,
)

AXES = ("pp", "sp", "tp", "ep")


def config_of(case: dict[str, Any], folder: Path, replicas: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": case["stage"]}
    for part in ("param", "optimizer"):
        home = case.get(part, "none")
        if home != "none":
            zero[f"offload_{part}"] = {"device": home} | ({"nvme_path": str(folder)} if home == "nvme" else {})
    return {
        "train_micro_batch_size_per_gpu": SAMPLES,
        "gradient_accumulation_steps": case["numbers"] // replicas,
        "optimizer": {"type": "AdamW", "params": {"lr": case["lr"], "eps": 1e-5, "weight_decay": 0.01}},
        "gradient_clipping": case["clip"],
        "zero_optimization": zero,
        "zeroxide": {"threads": 1, "mesh": {axis: case[axis] for axis in AXES[:3] if case.get(axis, 1) > 1}},
        **({"expert_parallel": {"enabled": True, "autoep_size": case["ep"]}} if case.get("ep", 1) > 1 else {}),
        **case.get("config", {}),
    }


def loss_of_part(output: Any, labels: torch.Tensor) -> torch.Tensor:
    """Over the tokens of all ranks that share them."""
    own = torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), labels.flatten())
    return average_over_tokens(own, (labels != IGNORED).sum())


class Loop:
    """How a script trains in one composition."""

    def __init__(self, case: dict[str, Any], folder: Path) -> None:
        self.case = case
        size = {axis: case.get(axis, 1) for axis in AXES}
        self.replicas = dist.get_world_size() // (size["pp"] * size["sp"] * size["tp"])
        # Ranks count through tp first, then sp, the replicas and pp.
        self.replica = dist.get_rank() // (size["tp"] * size["sp"]) % self.replicas
        self.sp, self.shared = size["sp"], dist.get_rank() // size["tp"] % size["sp"]
        self.pipeline = size["pp"] > 1
        self.model = build(case["model"])
        self.mpu = None
        model: Any = self.model
        if self.sp > 1 and self.pipeline:
            model = PipelineModule.from_model(self.model, size["pp"], loss_fn=loss_of_part)
        if self.sp > 1:
            axes = Mesh(pp=size["pp"], dp_shard=self.replicas, sp=size["sp"], tp=size["tp"])
            mesh = ProcessMesh(dist.get_rank(), dist.get_world_size(), axes)
            initialize_sequence_parallel(self.sp, mesh=mesh)
            self.mpu = UlyssesSPAttentionHF.register_with_transformers(self.model, "sdpa", self.sp, SAMPLES)
        config = config_of(case, folder, self.replicas)
        given = {} if self.mpu is None else {"mpu": self.mpu}
        self.engine = zeroxide.initialize(model=model, config=config, **given)[0]

    def step(self, number: int) -> float:
        """The mean loss of one optimizer step over all samples."""
        mine = [batch(self.case["model"], number, at) for at in range(self.case["numbers"])][
            self.replica :: self.replicas
        ]
        if self.pipeline and self.sp > 1:
            mine = [shard_batch(each, self.shared, self.sp, pad_token_id=0) for each in mine]
            # What a stage takes out of a batch for the loss.
            mine = [
                {"labels" if name == "shift_labels" else name: part for name, part in each.items()} for each in mine
            ]
        if self.pipeline:
            return float(self.engine.train_batch(iter(mine)))
        found = []
        for each in mine:
            loss = self._shared_loss(each) if self.sp > 1 else self.engine(**each, use_cache=False).loss
            self.engine.backward(loss)
            self.engine.step()
            found.append(loss.item())
        total = torch.tensor([sum(found) / len(found)], dtype=torch.float64)
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()

    def _shared_loss(self, each: dict[str, torch.Tensor]) -> torch.Tensor:
        part = shard_batch(each, self.shared, self.sp, pad_token_id=0)
        targets = part.pop("shift_labels")
        logits = self.engine(**part, use_cache=False).logits
        own = self.model.loss_function(
            logits=logits, labels=None, shift_labels=targets, vocab_size=self.model.config.vocab_size
        )
        return average_over_tokens(own, (targets != IGNORED).sum())

    def digest(self) -> str:
        """Of the state that this rank has."""
        found = hashlib.sha256()
        for name, param in sorted(self.engine.module.named_parameters()):
            parts = [safe_get_local_fp32_param(param)]
            parts += [safe_get_local_optimizer_state(param, key) for key in ("exp_avg", "exp_avg_sq")]
            found.update(name.encode())
            for part in parts:
                assert part is not None
                found.update(part.numpy().tobytes())
        return found.hexdigest()

    def close(self) -> None:
        """Ends the engine, and what was changed for it."""
        self.engine.destroy()
        if self.mpu is not None:
            self.mpu.unregister()
            destroy_sequence_parallel()


def train(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    loop = Loop(case, folder)
    try:
        first = 0
        if "load" in case:
            path, _ = loop.engine.load_checkpoint(folder / case["load"])
            assert path is not None
            first = loop.engine.global_steps
        losses, norms = [], []
        for step in range(first, first + case["steps"]):
            losses.append(loop.step(step))
            norms.append(float(loop.engine.get_global_grad_norm()))
        loop.engine.save_checkpoint(folder / case["name"], tag="end")
        return {"losses": losses, "norms": norms, "digest": loop.digest()}
    finally:
        dist.barrier()
        loop.close()


def main() -> None:
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    zeroxide.init_distributed(verbose=False)
    for case in json.loads(path.read_text()):
        print("CASE", json.dumps(train(case, path.parent)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

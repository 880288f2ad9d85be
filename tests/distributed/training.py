"""A job that trains many times in the same processes, as the cases in the file named by its argument say.

Every rank prints a line "CASE {...}" of JSON for each case: losses, norms, digests of everything that was computed, and
what the process holds afterwards. See `Case`. The process group is made here, so that the engines leave it alone.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from families import build, micro_batch
from models import loss_of
from plain import train_plain
from torch import nn
from traces import Trace

import zeroxide
from zeroxide.device.placement import spec
from zeroxide.engine.engine import Engine

PARTS = ("weights", "exp_avg", "exp_avg_sq")
KINDS = ("reductions", "updates")


@dataclass(frozen=True)
class Case:
    """One training run.

    plain: PyTorch's own data-parallel training instead of the engine.
    total: micro-batches of a step over all ranks, whose losses are summed: the same numbers at every world size. None
        for `accumulation` micro-batches a rank, averaged.
    record, follow: a folder for the trace of the run, or with one; a run that follows begins every step where the
        trace did, so that steps can be compared one by one.
    mesh, hpz: `zeroxide.mesh` and `zero_hpz_partition_size`.
    """

    name: str
    family: str = "gpt"
    plain: bool = False
    stage: int = 3
    param: str = "none"
    optimizer: str = "none"
    transport: str = "shared_memory"
    gradients: str = "auto"
    dtype: str = "fp32"
    steps: int = 3
    accumulation: int = 2
    total: int | None = None
    clip: float | None = 0.5
    config: dict[str, Any] = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    record: str | None = None
    follow: str | None = None
    mesh: dict[str, int] = field(default_factory=dict)
    hpz: int | None = None

    @property
    def micro_batches(self) -> int:
        """Of one rank in one step."""
        return self.accumulation if self.total is None else self.total // dist.get_world_size()

    def batch(self, step: int, micro: int) -> dict[str, torch.Tensor]:
        """This rank's micro-batch."""
        world = dist.get_world_size()
        number = step * world * self.micro_batches + micro * world + dist.get_rank()
        return micro_batch(self.family, number)


def config_of(case: Case, folder: Path) -> dict[str, Any]:
    def home(device: str) -> dict[str, Any]:
        return {"device": device, **({"nvme_path": str(folder)} if device == "nvme" else {})}

    zero: dict[str, Any] = {"stage": case.stage}
    if case.stage > 0:
        zero["offload_optimizer"] = home(case.optimizer)
    if case.stage == 3:
        zero["offload_param"] = home(case.param)
    if case.hpz is not None:
        zero["zero_hpz_partition_size"] = case.hpz
    own: dict[str, Any] = {"transport": case.transport, "threads": 1, "tile_bytes": 16384, "staging_bytes": 1 << 20}
    own["gradients"] = case.gradients
    if case.mesh:
        own["mesh"] = case.mesh
    return {
        "bf16": {"enabled": case.dtype == "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": zero,
        "zeroxide": own,
        "steps_per_print": None,
        "gradient_clipping": case.clip or 0,
        "data_types": {"buffer_dtype": case.dtype},
        "gradient_accumulation_steps": case.micro_batches,
        "gradient_allreduce_op": "mean" if case.total is None else "sum",
        **case.config,
    }


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for matrices only, and a rate of its own for the rest."""
    trainable = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [param for param in trainable if param.dim() > 1], "weight_decay": 0.1},
        {"params": [param for param in trainable if param.dim() <= 1], "weight_decay": 0.0, "lr": 3e-3},
    ]


def whole_state(engine: Engine) -> dict[str, dict[str, torch.Tensor]]:
    """fp32 weights and moments of every parameter, put together from what each rank saves."""
    core = engine.parts.core()
    found: dict[str, dict[str, torch.Tensor]] = {}
    for unit in engine.parts.units:
        values = {(at, part): torch.zeros(shape.numel()) for at, shape in enumerate(unit.shapes) for part in PARTS}
        for at, start, count in core.pieces(unit.index):
            for part in PARTS:
                core.read_param(unit.index, at, part, start, spec(values[at, part][start : start + count]))
        for at, (name, shape) in enumerate(zip(unit.names, unit.shapes, strict=True)):
            found[name] = {}
            for part in PARTS:
                # Every element is on one rank and zero on the others: the sum of the bits is the bits.
                dist.all_reduce(values[at, part].view(torch.int32))
                found[name][part] = values[at, part].view(shape)
    return found


def live_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """The weights as forward sees them on this rank."""
    found = {}
    for unit in engine.parts.units:
        engine.parts.gatherer.gather(unit)
        found |= {name: param.detach().clone() for name, param in zip(unit.names, unit.params, strict=True)}
        engine.parts.gatherer.release(unit)
    return found


def put_state(engine: Engine, state: dict[str, dict[str, torch.Tensor]], updates: dict[str, int]) -> None:
    core = engine.parts.core()
    for unit in engine.parts.units:
        for part in PARTS:
            core.fill_begin(unit.index, part)
            for at, name in enumerate(unit.names):
                core.fill_param(unit.index, at, 0, spec(state[name][part].contiguous().view(-1)))
            core.fill_commit(unit.index)
        for at, name in enumerate(unit.names):
            core.set_updates(unit.index, at, updates.get(name, 0))
    dist.barrier()


def updates_of(engine: Engine) -> dict[str, int]:
    """Updates that each trainable parameter has had."""
    core = engine.parts.core()
    return {
        name: core.updates(unit.index, at)
        for unit in engine.parts.units
        for at, name in enumerate(unit.names)
        if unit.trainable[at]
    }


def digest(tensors: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def sent_by(engine: Engine) -> dict[str, list[int]]:
    """Bytes of gradients that have left this rank, within its shard group and across, by what they are for."""
    sent = engine.parts.reduction.sent
    return {kind: [getattr(sent, kind).within, getattr(sent, kind).across] for kind in KINDS}


def between_steps(engine: Engine, case: Case, step: int) -> list[float]:
    """Evaluation, and generation where the model can, in the middle of training. The same on every rank."""
    engine.eval()
    found = []
    with torch.no_grad():
        batch = micro_batch(case.family, 10_000 + step)
        found.append(loss_of(engine(**batch)).item())
        if "generate" in case.extras:
            ids = batch["input_ids"][:, :4]
            made = engine.module.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
            found += [float(each) for each in made.flatten().tolist()]
    engine.train()
    return found


def train(case: Case, folder: Path) -> dict[str, Any]:
    model = build(case.family)
    made = Trace(case.record) if case.record else None
    sizes = made.watch(model) if made else None
    engine, *_ = zeroxide.initialize(model=model, model_parameters=decay_groups(model), config=config_of(case, folder))
    trace = Trace.load(case.follow) if case.follow else None
    losses: list[float] = []
    norms: list[float] = []
    aside: list[float] = []
    worst: dict[str, float] = {}
    try:
        for step in range(case.steps):
            sent_before = sent_by(engine)
            if trace is not None and step > 0:
                put_state(engine, trace.before(step), trace.updates(step))
            if made is not None:
                made.begin(whole_state(engine))
            for micro in range(case.micro_batches):
                last = micro + 1 == case.micro_batches
                held = "no-sync" in case.extras and not last
                loss = loss_of(engine(**case.batch(step, micro)))
                if case.total is not None:
                    loss = loss / case.total
                if held:
                    with engine.no_sync():
                        engine.backward(loss, scale_wrt_gas=case.total is None)
                else:
                    engine.backward(loss, scale_wrt_gas=case.total is None)
                engine.step()
                losses.append(loss.item())
            sent_after = sent_by(engine)
            sent = {kind: [sent_after[kind][at] - sent_before[kind][at] for at in (0, 1)] for kind in KINDS}
            norms.append(float(engine.get_global_grad_norm() or 0.0))
            if made is not None and sizes is not None:
                made.end(sizes, mean=case.total is None, norm=norms[-1], updates=updates_of(engine))
            if trace is not None:
                trace.compare(step, whole_state(engine), losses[-case.micro_batches :], norms[-1], worst, case)
            if "between" in case.extras:
                aside += between_steps(engine, case, step)
        state = whole_state(engine)
        live = live_weights(engine)
        if made is not None:
            made.close(state, losses, case.micro_batches)
        flat = {f"{name} {part}": value for name, parts in state.items() for part, value in parts.items()}
        return {
            "losses": losses,
            "norms": norms,
            "aside": aside,
            "state": digest(flat),
            "live": digest(live),
            "buffers": digest({name: each for name, each in model.named_buffers() if each.is_floating_point()}),
            "skipped": engine.skipped_steps,
            "sent": engine.exchanged_bytes(),
            "last_step": sent,
            "worst": worst,
        }
    finally:
        # Whoever is first would otherwise take its memory away from those who still read it.
        dist.barrier()
        engine.destroy()


def held() -> dict[str, Any]:
    """What this process holds now."""
    gc.collect()
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    with open("/proc/self/maps") as file:
        mapped = sum("memfd:zeroxide" in line for line in file)
    return {
        "descriptors": len(links),
        "memfds": sum("memfd:zeroxide" in link for link in links),
        "mapped": mapped,
        "threads": len(os.listdir("/proc/self/task")),
        "python_threads": threading.active_count(),
    }


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(os.environ["JOB_FOLDER"])
    cases = [
        Case(**{**each, "extras": tuple(each.get("extras", ()))}) for each in json.loads(Path(sys.argv[1]).read_text())
    ]
    dist.init_process_group("gloo")
    for case in cases:
        start = time.perf_counter()
        scratch = folder / "scratch"
        scratch.mkdir(exist_ok=True)
        found = train_plain(case, decay_groups) if case.plain else train(case, scratch)
        dist.barrier()
        found |= {
            "name": case.name,
            "held": held(),
            "seconds": time.perf_counter() - start,
            "scratch": len(list(scratch.iterdir())),
        }
        print("CASE", json.dumps(found), flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

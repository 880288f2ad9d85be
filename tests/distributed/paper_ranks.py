"""A rank that trains in several compositions of axes while everything that leaves it is counted, and says what was
planned on paper. The cases are in the file named by its argument.

Prints "CASE {...}" for each. Bytes are counted where torch is called, whoever calls it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import composed_ranks
import torch
import torch.distributed as dist
from composed_models import SAMPLES, TOKENS, build

import zeroxide
from zeroxide.config import load
from zeroxide.engine.on_paper.plan import plan_job
from zeroxide.engine.on_paper.stand_ins import balance
from zeroxide.moe.spread import with_experts
from zeroxide.plan.schedule import collectives

sent: dict[str, int] = {}
counting = False


def ring(tensor: torch.Tensor, group: Any) -> int:
    ranks = dist.get_world_size(group)
    return 2 * (ranks - 1) * tensor.nbytes // ranks


def to_others(tensor: torch.Tensor, group: Any) -> int:
    return (dist.get_world_size(group) - 1) * tensor.nbytes


def exchanged(leaving: torch.Tensor, sizes: list[int], group: Any) -> int:
    assert leaving.dtype is torch.uint8
    return sum(sizes) - sizes[dist.get_rank(group)]


BYTES: dict[str, Callable[..., int]] = {
    "isend": lambda tensor, **_: tensor.nbytes,
    "all_reduce": lambda tensor, op=None, group=None, **_: ring(tensor, group),
    "all_gather": lambda rows, tensor, group=None, **_: to_others(tensor, group),
    "all_gather_single": lambda rows, tensor, group=None, **_: to_others(tensor, group),
    "all_gather_into_tensor": lambda rows, tensor, group=None, **_: to_others(tensor, group),
    "all_to_all_single": lambda arriving, leaving, given, to, group=None, **_: exchanged(leaving, to, group),
    "broadcast": lambda tensor, source=None, group=None, **_: tensor.nbytes,
}
NAMES = {
    "isend": "send", "all_gather_single": "all_gather", "all_gather_into_tensor": "all_gather",
    "all_to_all_single": "all_to_all",
}  # fmt: skip
REFUSED = (
    "send", "reduce", "gather", "scatter", "all_to_all", "reduce_scatter", "reduce_scatter_tensor", "barrier",
    "all_gather_object", "gather_object", "broadcast_object_list", "batch_isend_irecv",
)  # fmt: skip


def watch_torch() -> None:
    def counted(name: str, call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            global counting
            if not counting:
                return call(*args, **kwargs)
            op = NAMES.get(name, name)
            assert name in BYTES, f"{name} is not counted"
            sent[op] = sent.get(op, 0) + BYTES[name](*args, **kwargs)
            # One may call another.
            counting = False
            try:
                return call(*args, **kwargs)
            finally:
                counting = True

        return run

    for name in (*BYTES, *REFUSED):
        call = getattr(dist, name, None)
        if call is not None:
            setattr(dist, name, counted(name, call))


@contextlib.contextmanager
def count() -> Iterator[None]:
    global counting
    sent.clear()
    counting = True
    try:
        yield
    finally:
        counting = False


def config_for(case: dict[str, Any], folder: Path, replicas: int) -> dict[str, Any]:
    config = plain_config(case, folder, replicas)
    config["zeroxide"] = {**config["zeroxide"], "transport": "collective", **case.get("own", {})}
    return config


plain_config = composed_ranks.config_of
composed_ranks.config_of = config_for


def on_paper(case: dict[str, Any], folder: Path, replicas: int) -> Any:
    """The plan of the same job."""

    def make() -> Any:
        with torch.device("meta"):
            return build(case["model"])

    def prepare(model: Any) -> None:
        if case.get("again"):
            model.gradient_checkpointing_enable({"use_reentrant": False})

    world = dist.get_world_size()
    config = with_experts(load(config_for(case, folder, replicas), world_size=world), make(), world)
    return plan_job(make, config, world, TOKENS, prepare)


def train(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    loop = composed_ranks.Loop(case, folder)
    if case.get("again"):
        loop.model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        for module in loop.model.modules():
            if case.get("ep", 1) > 1 and "gate_up_proj" in module._parameters:
                balance(module, case["experts"])
        for step in range(2):
            loop.step(step)
        with count():
            loop.step(2)
        found = dict(sent)
        if not loop.pipeline:
            # The script's own, of one number.
            found["all_reduce"] -= 2 * (dist.get_world_size() - 1) * 8 // dist.get_world_size()
        found = {op: nbytes for op, nbytes in found.items() if nbytes}
        rank = loop.engine.stage_id if loop.pipeline else 0
        plan = on_paper(case, folder, loop.replicas).ranks[rank]
        planned: dict[str, int] = {}
        for each in plan.sent:
            planned[each.op] = planned.get(each.op, 0) + each.nbytes
        kinds = {kind: plan.sent_bytes(kind) for kind in {each.kind for each in plan.sent}}
        buckets = loop.engine.plan().buckets
        found = {"sent": found, "planned": planned, "kinds": kinds, "buckets": [buckets, plan.buckets]}
        if loop.pipeline:
            engine = loop.engine
            moved = sum(each.sent for each in collectives(engine.plan(), engine.pipeline_passes()))
            found["own"] = [
                [moved, engine.plan().in_flight],
                [kinds.get("weights", 0) + kinds.get("gradients", 0), plan.in_flight],
            ]
        return found
    finally:
        dist.barrier()
        loop.close()


def main() -> None:
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    zeroxide.init_distributed(verbose=False)
    watch_torch()
    assert SAMPLES == 2
    for case in json.loads(path.read_text()):
        print("CASE", json.dumps(train(case, path.parent)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

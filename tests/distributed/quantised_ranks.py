"""What the ranks of `test_quantised.py` run: training with quantised collectives, and what was sent and computed with.

A line `FOUND` of JSON for each case of the file named on the command line, from every rank.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from families import build, micro_batch
from models import loss_of
from torch import nn
from torch.nn import functional

import zeroxide
from zeroxide.distributed import UnitGroups
from zeroxide.engine import build as build_module
from zeroxide.engine.engine import Engine
from zeroxide.kernels.quantise import reference, reference_values
from zeroxide.plan.schedule import collectives, sent_across_groups, sent_bytes
from zeroxide.zero import messages

NEAR = 2
"""Ranks of a group, in a row."""
WIDTH, BLOCKS = 632, 4
"""Two linear layers of this width are padded by less than 0.4 % over four ranks."""

SEEN: dict[str, int] = {}


class Spied(messages.Messages):
    """Counts bytes by the ranks that they go to, whatever anybody else counts."""

    def start(self, work: Any, incoming: Any, outgoing: Any) -> None:
        outgoing = list(outgoing)
        for rank, tensor in outgoing:
            where = "across" if rank // NEAR != self.ranks.rank // NEAR else "within"
            key = f"{work.kind} {where}"
            SEEN[key] = SEEN.get(key, 0) + tensor.nbytes
        super().start(work, incoming, outgoing)


class Layers(nn.Module):
    """Blocks and nothing else: each is a unit."""

    def __init__(self, width: int = WIDTH, blocks: int = BLOCKS, frozen: int = 0) -> None:
        super().__init__()
        self.h = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) for _ in range(blocks)
        )
        for block in self.h[:frozen]:
            block.requires_grad_(False)
        self.used: list[str] = []
        """A digest of the weights of a block whenever forward has used it."""
        self.back: list[str] = []
        """The same in the middle of its backward."""
        for block in self.h:
            block.register_forward_hook(self._note)
            block[1].register_forward_hook(partial(self._note_back, block))

    def _note(self, block: nn.Module, args: Any, output: Any) -> None:
        self.used.append(digest([param.detach() for param in block.parameters()]))

    def _note_back(self, block: nn.Module, between: nn.Module, args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(
                lambda grad: self.back.append(digest([param.detach() for param in block.parameters()]))
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.h:
            x = x + block(x)
        return x.float().square().mean()


class Given(nn.Module):
    """Its gradient is what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([nn.Linear(64, 96, bias=False)])

    def forward(self, gradient: torch.Tensor) -> torch.Tensor:
        return Given.product(self.h[0], gradient)

    @staticmethod
    def product(layer: nn.Module, gradient: torch.Tensor) -> torch.Tensor:
        """The sum of products of the layer's output for the identity, which is its weight, with `gradient`."""
        weight = layer(torch.eye(64, dtype=gradient.dtype))
        return (weight * gradient.t()).sum()


def digest(tensors: list[torch.Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def config_of(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": 3, **case["zero"]},
        "gradient_accumulation_steps": case.get("micro_batches", 1),
        "steps_per_print": None,
        "gradient_clipping": case.get("clip", 1.0),
        "zeroxide": {
            "transport": case.get("transport", "collective"),
            "threads": 1,
            "prefetch": case.get("prefetch", 1),
            **({"mesh": case["mesh"]} if "mesh" in case else {}),
        },
        **case.get("more", {}),
    }


def step(engine: Engine, case: dict[str, Any], number: int) -> float:
    rank, total = dist.get_rank(), 0.0
    width = case.get("width", WIDTH)
    for micro in range(case.get("micro_batches", 1)):
        generator = torch.Generator().manual_seed(1000 * number + 10 * micro + rank)
        x = torch.randn(4, width, generator=generator).to(next(iter(engine.module.parameters())).dtype)
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        total += loss.item()
    return total


def counts(engine: Engine) -> list[int]:
    sent, weights = engine.parts.reduction.sent, engine.parts.weights
    return [engine.exchanged_bytes(), sent.across + weights.sent_across]


def meant(engine: Engine) -> list[str]:
    """Digests of what the codes of each block's exact weights stand for, by torch: of elements in the unit's order."""
    found = []
    for unit in engine.parts.units:
        flat = torch.zeros(unit.layout_numel, dtype=unit.flat.dtype)
        places = [engine.parts.core().param_offset(unit.index, at) for at in range(len(unit.params))]
        with zeroxide.zero.GatheredParameters(unit.params):
            for place, param in zip(places, unit.params, strict=True):
                flat[place : place + param.numel()] = param.detach().reshape(-1)
        back = reference_values(reference(flat, 8), flat.dtype)
        pieces = zip(places, unit.shapes, strict=True)
        found.append(digest([back[place : place + shape.numel()].view(shape) for place, shape in pieces]))
    return found


def train(case: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype = getattr(torch, case.get("dtype", "bfloat16"))
    model = Layers(case.get("width", WIDTH), case.get("blocks", BLOCKS), case.get("frozen", 0)).to(dtype)
    engine, *_ = zeroxide.initialize(model=model, config=config_of(case), lr=1e-3)
    losses, norms = [], []
    if case.get("edited"):
        # What was gathered for this step is old afterwards, though no step has said so.
        step(engine, case, 99)
        with zeroxide.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            for param in model.parameters() if dist.get_rank() == 0 else ():
                param.data.mul_(1.5)
    expected = meant(engine) if case.get("meant") else []
    model.used.clear()
    model.back.clear()
    for number in range(case.get("steps", 3)):
        SEEN.clear()
        before = counts(engine)
        losses.append(step(engine, case, number))
        norms.append(float(engine.get_global_grad_norm()))
    after = counts(engine)
    plan = engine.plan()
    usage = engine.memory()
    found = {
        "losses": losses,
        "norms": norms,
        "used": list(model.used),
        "back": list(model.back),
        "meant": expected,
        "counted": [now - then for now, then in zip(after, before, strict=True)],
        "planned": [sent_bytes(plan), sent_across_groups(plan)],
        "gathered_twice": sum(each.kind == "all-gather" for each in collectives(plan)) - len(plan.units),
        "seen": dict(SEEN),
        "buckets": plan.buckets,
        "usage": {name: usage[name]["peak"] for name in plan.buckets},
        "described": plan.describe(),
        "parameters": sum(unit.numel for unit in plan.units),
    }
    dist.barrier()
    engine.destroy()
    return found


def feed(case: dict[str, Any]) -> dict[str, Any]:
    """Gradients that are given: how far the mean of what is summed is from the mean of what was given, the largest
    value of that over all elements; and the largest that any rank gave."""
    torch.manual_seed(0)
    engine, *_ = zeroxide.initialize(model=Given(), config=config_of(case), lr=0.0)
    weight = engine.module.h[0].weight
    exact, sums, largest = torch.zeros(96, 64, dtype=torch.float64), torch.zeros(96, 64, dtype=torch.float64), 0.0
    world, expected = dist.get_world_size(), None
    for number in range(case["steps"]):
        given = [gradient(number, rank, case["kind"]) for rank in range(world)]
        largest = max(largest, *(each.abs().max().item() for each in given))
        exact += torch.stack(given).double().mean(0)
        engine.backward(engine(given[dist.get_rank()]))
        found = zeroxide.safe_get_full_grad(weight)
        if expected is None:
            # Nothing has been lost yet that could come back.
            expected = torch.equal(found, reduced(given, engine.plan().groups))
        sums += found.double()
        engine.step()
    apart = (sums - exact).abs().max().item() / case["steps"]
    dist.barrier()
    engine.destroy()
    return {"apart": apart, "largest": largest, "expected": expected}


def reduced(given: list[torch.Tensor], groups: UnitGroups) -> torch.Tensor:
    """The mean of all ranks' gradients as the two hops make it, by torch, whoever sums which slice."""
    world, near = len(given), groups.near
    slices = [functional.pad(each.flatten(), (0, 2048 * world - each.numel())).view(world, -1) for each in given]

    def travelled(values: torch.Tensor) -> torch.Tensor:
        return reference_values(reference(values, 4), torch.float32)

    def sum_of(group: int, place: int, piece: int) -> torch.Tensor:
        ranks = range(group * near, (group + 1) * near)
        total = slices[group * near + place][piece].clone()
        for rank in ranks:
            if rank != group * near + place:
                total += travelled(slices[rank][piece])
        return total

    made = []
    for piece, owner in enumerate(groups.owners()):
        own, place = divmod(owner, near)
        total = sum_of(own, place, piece)
        for group in range(world // near):
            if group != own:
                total += travelled(sum_of(group, place, piece))
        made.append(total / world)
    return torch.cat(made)[: given[0].numel()].view_as(given[0])


def gradient(number: int, rank: int, kind: str) -> torch.Tensor:
    """Small numbers beside one large one in each block of 256, which decides the scale: 7, for a scale of 1.

    "steady": 0.3 everywhere and a little noise. "pairs": 1 on the first rank of each group and nothing on the other,
    which the first hop gives exactly; the scale of sums is 2, and the second rounds 1 to nothing.
    """
    generator = torch.Generator().manual_seed(100 * number + rank)
    if kind == "pairs":
        made = torch.full((96, 64), 1.0 - rank % NEAR)
    else:
        made = 0.3 + 0.05 * torch.randn((96, 64), generator=generator)
    made[::4, 0] = 7.0
    return made


def learn(case: dict[str, Any]) -> dict[str, Any]:
    """Losses of a tiny model of a family that is given the same few batches again and again."""
    family = case.get("family", "gpt")
    engine, *_ = zeroxide.initialize(model=build(family), config=config_of(case), lr=3e-3, dtype="bf16")
    losses, first = [], 0.0
    for number in range(case["steps"]):
        loss = loss_of(engine(**micro_batch(family, 4 * (number % 2) + dist.get_rank())))
        engine.backward(loss)
        if number == 0:
            # Of the mean loss over ranks, to first order of a weight that moves.
            first = math.sqrt(
                sum(
                    zeroxide.safe_get_full_grad(param).double().square().sum().item()
                    for param in engine.module.parameters()
                )
            )
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    largest = max(zeroxide.safe_get_full_fp32_param(param).abs().max().item() for param in engine.module.parameters())
    dist.barrier()
    engine.destroy()
    return {"losses": losses, "norm": first, "largest": largest}


def overflow(case: dict[str, Any]) -> dict[str, Any]:
    """One rank's gradient is not finite in step 2, in a block that it does not sum itself."""
    torch.manual_seed(0)
    engine, *_ = zeroxide.initialize(model=Given(), config=config_of(case), lr=1e-3)
    before, kept, applied, norms = [], [], [], []
    for number in range(5):
        given = gradient(number, dist.get_rank(), "steady")
        if number == 2 and dist.get_rank() == 1:
            given[90, 5] = float("inf")
        engine.backward(engine(given.to(engine.module.h[0].weight.dtype)))
        before.append(engine.loss_scale())
        engine.step()
        applied.append(engine.was_step_applied())
        norms.append(float(engine.get_global_grad_norm()))
        kept.append(float(engine.parts.residuals._all.float().abs().max()))
    dist.barrier()
    engine.destroy()
    return {"scales": before, "applied": applied, "norms": norms, "kept": kept, "skipped": engine.skipped_steps}


def resume(case: dict[str, Any]) -> dict[str, Any]:
    """Three steps, a checkpoint, three more; then another engine goes on from the checkpoint."""
    ends, kept = [], []
    for act in ("save", "load"):
        torch.manual_seed(0 if act == "save" else 1)
        model = Layers(case["width"], 2).bfloat16()
        engine, *_ = zeroxide.initialize(model=model, config=config_of(case), lr=1e-3)
        if act == "save":
            for number in range(3):
                step(engine, case, number)
            kept.append(float(engine.parts.residuals._all.float().abs().max()))
            engine.save_checkpoint(case["folder"])
            kept.append(float(engine.parts.residuals._all.float().abs().max()))
        else:
            step(engine, case, 99)
            engine.load_checkpoint(case["folder"])
        losses = [step(engine, case, number) for number in range(3, 6)]
        state = engine.module_state_dict()
        ends.append([losses, digest(list(state.values()))])
        dist.barrier()
        engine.destroy()
    return {"ends": ends, "kept": kept}


ACTS = {"train": train, "learn": learn, "feed": feed, "overflow": overflow, "resume": resume}


def main() -> None:
    torch.set_num_threads(1)
    build_module.Messages = Spied  # type: ignore[misc]
    dist.init_process_group("gloo")
    folder = os.environ["JOB_FOLDER"]
    for case in json.loads(Path(sys.argv[1]).read_text()):
        found = ACTS[case.get("act", "train")]({**case, "folder": folder})
        print("FOUND", json.dumps({"name": case["name"], **found}), flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

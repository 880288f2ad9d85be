"""Ranks that train in both orders of micro-batches, in the cases given as JSON, and say where results differ.

Each rank takes other samples. A case: {"family", "stage", "param", "optimizer", "transport", "count", "mesh"}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "numerics")]

from models import Gpt, batches, build  # noqa: E402
from torch import nn  # noqa: E402

import zeroxide  # noqa: E402
from zeroxide.zero.layer_order import LayerOrder  # noqa: E402


class Untied(Gpt):
    """A head of its own, at the root."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(self.head.weight.detach().clone())


class SometimesCut(Gpt):
    """Cuts the graph in the middle for every other micro-batch, which gives no gradient of what is before."""

    seen = 0

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.wte(input_ids)
        number, self.seen = self.seen, self.seen + 1
        for at, block in enumerate(self.h):
            hidden = block(hidden)
            if at == 1 and number % 2:
                hidden = hidden.detach()
        return self.norm(hidden)


class TwiceOnOneRank(Gpt):
    """Rank 0 uses its last block twice for one micro-batch."""

    seen = 0

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.wte(input_ids)
        self.seen += 1
        twice = self.seen % 3 == 1 and dist.get_rank() == 0
        for block in self.h:
            hidden = block(hidden)
        if twice:
            hidden = self.h[3](hidden)
        return self.norm(hidden)


FAMILIES = {"untied": Untied, "sometimes-cut": SometimesCut, "twice-on-one-rank": TwiceOnOneRank}


def made(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family]() if family in FAMILIES else build(family)
    model.train()
    return model


def run(case: dict[str, Any], order: str, folder: str) -> dict[str, Any]:
    def home(device: str) -> dict[str, Any]:
        return {"device": device, **({"nvme_path": folder} if device == "nvme" else {})}

    zero: dict[str, Any] = {"stage": case.get("stage", 3)}
    if zero["stage"] > 0:
        zero["offload_optimizer"] = home(case.get("optimizer", "none"))
    if zero["stage"] == 3:
        zero["offload_param"] = home(case.get("param", "none"))
    own: dict[str, Any] = {"transport": case.get("transport", "shared_memory"), "threads": 1}
    own |= {"tile_bytes": 16384, "staging_bytes": 1 << 20, "accumulation_order": order}
    if "mesh" in case:
        own["mesh"] = case["mesh"]
    count = case.get("count", 3)
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "gradient_clipping": 0.5,
        "zero_optimization": zero,
        "zeroxide": own,
        "gradient_accumulation_steps": count,
    }
    world = dist.get_world_size()
    family = case.get("family", "gpt")
    samples = batches("gpt" if family in FAMILIES else family, 2 * count * world)
    feed = iter(samples[dist.get_rank() :: world])
    engine, *_ = zeroxide.initialize(model=made(family), config=config)
    if case.get("short") == dist.get_rank():
        next(feed)
    switched = [0]
    plain = LayerOrder._hand_on

    def counted(self: LayerOrder, each: Any) -> None:
        switched[0] += not self._forward and self._next() != each.number
        plain(self, each)

    LayerOrder._hand_on = counted  # type: ignore[method-assign]
    try:
        losses, norms, sent = [], [], []
        for _ in range(2):
            before = engine.parts.weights.sent_bytes
            losses.append(float(engine.train_batch(feed)))
            engine.finish_step()
            sent.append(engine.parts.weights.sent_bytes - before)
            norms.append(float(engine.get_global_grad_norm()))
        state = state_of(engine)
    finally:
        LayerOrder._hand_on = plain  # type: ignore[method-assign]
        engine.destroy()
    return {"losses": losses, "norms": norms, "state": state, "sent": sent, "switched": switched[0]}


def state_of(engine: Any) -> dict[str, list[torch.Tensor]]:
    found = {}
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            moments = [zeroxide.safe_get_full_optimizer_state(param, each) for each in ("exp_avg", "exp_avg_sq")]
            found[name] = [zeroxide.safe_get_full_fp32_param(param), *moments]
    return found


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    folder = sys.argv[2]
    for case in json.loads(sys.argv[1]):
        if "short" in case:
            ended = []
            for order in ("batches", "layers"):
                try:
                    run(case, order, folder)
                except StopIteration as error:
                    ended.append(str(error))
            print("CASE", json.dumps(ended), flush=True)
            continue
        one, other = run(case, "batches", folder), run(case, "layers", folder)
        different = [name for name in ("losses", "norms") if one[name] != other[name]]
        for name, parts in one["state"].items():
            same = all(torch.equal(a, b) for a, b in zip(parts, other["state"][name], strict=True))
            different += [] if same else [name]
        sent = [one["sent"], other["sent"]]
        print("CASE", json.dumps({"different": different, "switched": other["switched"], "sent": sent}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

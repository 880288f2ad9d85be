"""A plain loop under Fabric, and what became of each of its runs, as JSON.

`fabric_program.py FOLDER CASES`; a case is [name, strategy, what else].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning_model import network
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import zeroxide.integrations.lightning  # noqa: F401

FOLDER = Path(sys.argv[1])
torch.set_num_threads(1)


def batches(fabric: lightning.Fabric) -> Any:
    data = torch.randint(0, 32, (48, 6), generator=torch.Generator().manual_seed(5))
    return fabric.setup_dataloaders(DataLoader(TensorDataset(data), batch_size=4 // fabric.world_size))


def run(name: str, strategy: str, more: list[str]) -> dict[str, Any]:
    fabric = lightning.Fabric(accelerator="cpu", devices=2 if "two ranks" in more else 1, strategy=strategy)
    fabric.launch()
    with fabric.init_module():
        model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    if "plain" not in more:
        assert all((each.numel() == 0) == (strategy in ("zeroxide", "zeroxide_stage_3")) for each in model.parameters())
    model, optimizer = fabric.setup(model, optimizer)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "step": 0}
    saved = next((each.removeprefix("resume ") for each in more if each.startswith("resume ")), None)
    if saved:
        rest = fabric.load(FOLDER / saved, state)
        assert rest == {"note": "kept"}
    losses, norms = [], []
    for at, (tokens,) in enumerate(batches(fabric)):
        if at < 3 * state["step"]:
            continue
        last = at % 3 == 2
        with fabric.no_backward_sync(model, enabled=not last):
            loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            fabric.backward(loss / 3)
        losses.append(fabric.all_reduce(loss.detach().clone()).item())
        if last:
            if state["step"] % 2 == 0:
                norms.append(fabric.clip_gradients(model, optimizer, max_norm=0.1).item())
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            state["step"] += 1
            if state["step"] == 2:
                fabric.save(FOLDER / name, {**state, "note": "kept"})
    weights = fabric.strategy.get_module_state_dict(model._forward_module)
    if fabric.is_global_zero:
        torch.save(weights, FOLDER / f"{name}.pt")
    fabric.barrier()
    return {"losses": losses, "norms": norms}


def main() -> None:
    results = {name: run(name, strategy, more) for name, strategy, more in json.loads(sys.argv[2])}
    if torch.distributed.get_rank() == 0:
        (FOLDER / "results.json").write_text(json.dumps(results))


main()

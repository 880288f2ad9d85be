"""Weights that travel and go up to simulated devices as int8, by kernels, beside the same training in host memory: the
bits are the same, also where the host wants elements of what it has as messages.

Argument: ranks of a group, 0 for none.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1])]

from simulated import device, engines

device.load()

from torch import nn

import zeroxide

torch.set_num_threads(1)
rank, group = int(os.environ["RANK"]), int(sys.argv[1])
zero = {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True}
zero |= {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
zero |= {"zero_hpz_partition_size": group} if group else {}


def train(where: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    # Each of four ranks has a part of a unit's values, and not of its padding alone.
    model = nn.Sequential(nn.Linear(80, 80), nn.Tanh(), nn.Linear(80, 80), nn.Tanh(), nn.Linear(80, 80))
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "zeroxide": {"threads": 1, "transport": "collective", "device": where},
    }
    kept = []
    if rank == 0:
        # Somebody has views of a unit, which stays on the device with them and is gathered all the same.
        model[2].register_forward_hook(lambda module, args, output: kept.append(module.weight.detach()))
    engine = zeroxide.initialize(model=model, config=config)[0]
    assert all(unit.layout_numel * 3 // 4 < 81 * 80 for unit in engine.parts.units)
    found, x = [], torch.linspace(-1, 1 + rank, 320).view(4, 80).to(engine.device, torch.bfloat16)
    for step in range(4):
        loss = engine(x).float().square().mean()
        if step == 1:
            # Weights change between forward and the next use, and the host has them as messages.
            with torch.no_grad():
                found.append(engine(x).cpu())
            with zeroxide.zero.GatheredParameters([model[2].weight], modifier_rank=0):
                found.append(model[2].weight.detach().cpu().clone())
                if rank == 0:
                    with torch.no_grad():
                        model[2].weight.mul_(0.5)
            loss = engine(x).float().square().mean()
        engine.backward(loss)
        engine.step()
        with torch.no_grad():
            found += [engine(x).cpu(), loss.detach().cpu()]
        if step == 2:
            kept.clear()
            found += [value.cpu() for value in engine.module_state_dict().values()]
    norm, weights = engine.get_global_grad_norm(), engine.parts.weights
    for unit in engine.parts.units if where == "sim" else ():
        # The device has taken messages, and the host wants elements of the same.
        weights.gather(unit)
        weights.host.gather(unit)
        assert torch.equal(unit.flat.view(torch.uint8), unit.memory.flat.cpu())
        weights.host.release(unit)
        weights.release(unit)
    engine.destroy()
    return [*found, torch.tensor(float(norm))]


torch.sim.set_delay(0, 200, seed=rank)
with engines.followed(kernels=True):
    there = train("sim")
    assert {*engines.launched()} == {"zx_dequantise_int8_bf16"}
    here = train("cpu")
assert [number for number, pair in enumerate(zip(there, here, strict=True)) if not torch.equal(*pair)] == []
assert [str(each) for each in torch.sim.races()] == []
print("same", flush=True)

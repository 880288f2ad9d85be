"""Every rank trains on a simulated device of its own and in host memory, on its own batches: the bits are the same.

Arguments: stage, home of parameters, home of state, transport ("quantised" is collective, with gradients that carry
what rounding has left; "expanded" is that with kernels; "viewed" is collective, with a rank that keeps views of a
weight), dtype.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / each) for each in ("", "numerics")]

from simulated import device, engines

device.load()

from models import batches, build, loss_of

import zeroxide

torch.set_num_threads(1)
stage, param, state, transport, dtype = sys.argv[1:]
rank = int(os.environ["RANK"])
folder = tempfile.mkdtemp()


def home(kind: str) -> dict[str, str]:
    return {"device": kind, **({"nvme_path": folder} if kind == "nvme" else {})}


zero = {"stage": int(stage)}
zero |= {"offload_param": home(param)} if param != "none" else {}
zero |= {"offload_optimizer": home(state)} if state != "none" else {}
viewed = transport == "viewed"
if viewed:
    transport = "collective"
kernels = transport == "expanded"
if transport in ("quantised", "expanded"):
    transport = "collective"
    zero |= {"zero_quantized_weights": True, "zero_quantized_gradients": True}
    zero |= {"zeropp_loco_param": {"err_beta": 0.8, "reset_T": 1024}}


def train(where: str) -> tuple[list[float], dict[str, torch.Tensor], int]:
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "gradient_clipping": 0.5,
        "gradient_accumulation_steps": 2,
        "zero_optimization": zero,
        "zeroxide": {"threads": 1, "transport": transport, "device": where},
        **({} if dtype == "fp32" else {dtype: {"enabled": True}}),
    }
    model, kept = build("gpt"), []
    if viewed and rank == 0:
        model.h[1].up.register_forward_hook(lambda module, args, output: kept.append(module.weight.detach()))
    engine, *_ = zeroxide.initialize(model=model, config=config)
    losses = []
    for batch in batches("gpt", 6, seed=10 + rank):
        loss = loss_of(engine(**{name: value.to(where) for name, value in batch.items()}))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    norm = float(engine.get_global_grad_norm())
    weights = {name: value.cpu() for name, value in engine.module_state_dict().items()}
    sent = engine.parts.weights.sent_bytes + engine.parts.reduction.sent.total
    if kernels and where == "sim":
        assert {*engines.launched()} == {f"zx_dequantise_int8_{dtype.replace('fp', 'f')}"}
        # A byte an element and two for each 256, in forward and backward of 6 batches; what is tied comes more often.
        full = sum(unit.layout_numel for unit in engine.parts.units)
        assert 12 * full <= engine.device_traffic()["up"] <= 13 * full
    engine.destroy()
    return [*losses, norm], weights, sent


torch.sim.set_delay(0, 300, seed=rank)
with engines.followed(kernels=kernels):
    there, here = train("sim"), train("cpu")
assert there[0] == here[0], (there[0], here[0])
assert there[1].keys() == here[1].keys()
assert all(torch.equal(value, here[1][name]) for name, value in there[1].items())
assert there[2] <= here[2], "bytes between ranks"
assert [bool(torch.sim.usage(each).allocations) for each in range(2)] == [rank == 0, rank == 1]
assert [str(each) for each in torch.sim.races()] == []
print("same", flush=True)

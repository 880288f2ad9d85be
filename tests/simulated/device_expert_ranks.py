"""Two ranks share the experts of a model, each with a simulated device, and in host memory: the bits are the same.

Arguments: family, stage, home of parameters, home of state, dtype.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / each) for each in ("", "distributed")]

from simulated import device, engines

device.load()

from expert_models import batches, build, loss_of, train_plain

import zeroxide

torch.set_num_threads(1)
family, stage, param, state, dtype = sys.argv[1:]
rank = int(os.environ["RANK"])
folder = tempfile.mkdtemp()


def home(kind: str) -> dict[str, str]:
    return {"device": kind, **({"nvme_path": folder} if kind == "nvme" else {})}


zero = {"stage": int(stage)}
zero |= {"offload_param": home(param)} if param != "none" else {}
zero |= {"offload_optimizer": home(state)} if state != "none" else {}


def train(where: str) -> tuple[list[float], dict[str, torch.Tensor], int]:
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "gradient_clipping": 0.5,
        "gradient_accumulation_steps": 2,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bf16"},
        "zeroxide": {"threads": 1, "transport": "collective", "device": where},
        **({} if family == "moe" else {"expert_parallel": {"enabled": True, "autoep_size": 2}}),
    }
    model = build(family, 2)
    if rank:
        # Rank 0's weights are those of all.
        with torch.no_grad():
            for each in model.parameters():
                each.add_(0.5)
    if stage == "1" and where == "sim":
        model.to(f"sim:{rank}")
    engine = zeroxide.initialize(model=model, config=config)[0]
    found = []
    for step in range(2):
        for micro in range(2):
            loss = loss_of(engine, batches(step, rank, micro, 2).to(where))
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
        found.append(float(engine.get_global_grad_norm()))
    weights = {name: value.cpu() for name, value in engine.module_state_dict().items()}
    exchanges = [each.exchange for each in engine.module.modules() if getattr(each, "exchange", None) is not None]
    sent = sum(each.sent_bytes for each in exchanges)
    engine.destroy()
    return found, weights, sent


torch.sim.set_delay(0, 300, seed=rank)
with engines.followed(kernels=True):
    there = train("sim")
    # How often depends on the sizes of models; both ways, each launched in forward and in backward.
    routed = {each.rsplit("_", 1)[0] for each in engines.launched()}
    here = train("cpu")
assert routed == {"zx_gather_rows", "zx_combine_rows"}, routed
assert there[0] == here[0], (there[0], here[0])
if dtype == "fp32":
    losses, norms, _ = train_plain(family, 2, 2)
    plain = [*losses[rank][:2], norms[0], *losses[rank][2:], norms[1]]
    # Sums of fp32 in another order, as in `test_experts_ranks.py`.
    assert all(abs(mine - other) <= 2e-6 * other for mine, other in zip(there[0], plain, strict=True)), plain
assert there[1].keys() == here[1].keys()
assert [name for name, value in here[1].items() if not torch.equal(there[1][name], value)] == []
assert there[2] == here[2] > 0, "bytes of tokens"
assert [bool(torch.sim.usage(each).allocations) for each in range(2)] == [rank == 0, rank == 1]
assert [str(each) for each in torch.sim.races()] == []
print("same", flush=True)

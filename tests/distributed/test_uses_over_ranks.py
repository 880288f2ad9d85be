"""Weights used more than once before their gradient is complete, and ranks that go their own way between steps."""

from __future__ import annotations

import pytest
from launching import run_ranks

# Each rank trains on its own rows; plain torch, on all rows, is the oracle. Sums of two ranks in fp32: a gradient is
# off by an ulp or two of its largest term. 1e-5 of the largest gradient is some 100 ulp of it, and far below what a use
# that is lost or counted twice changes: see the mutations in the commit.
JOB = """
import copy, os, tempfile, time
import torch
from torch import nn
import zeroxide

torch.set_num_threads(1)
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
case, transport, disk = sys.argv[1:4]
torch.manual_seed(0)
WIDE = 2900  # its square is more than what makes a Linear large

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, WIDE)
        self.large = nn.Linear(WIDE, WIDE, bias=False)  # a bias would end the unit later
        self.last = nn.Linear(WIDE, 1)

    def forward(self, x, twice):
        x = self.large(self.first(x).tanh()).tanh()
        if twice:
            x = self.large(x).tanh()
        return self.last(x).square().mean()

model = Net()
plain = copy.deepcopy(model)
oracle = torch.optim.SGD(plain.parameters(), lr=0.0)
config = {
    "zero_optimization": {"stage": 3},
    "zeroxide": {"transport": transport, "threads": 1, "unit_bytes": 1 << 20},  # a unit for each Linear
    "steps_per_print": 1000,
}
if disk == "disk":
    config["zero_optimization"]["offload_optimizer"] = {"device": "nvme", "nvme_path": tempfile.mkdtemp()}
engine, *_ = zeroxide.initialize(model=model, config=config, lr=1e-3)
rows = torch.randn(2 * world, 8)
mine = rows[2 * rank : 2 * rank + 2]

def losses(call, x):
    if case == "twice":
        return call(x, True)
    if case == "forwards":
        return call(x, False) + 0.5 * call(2 * x, False)
    return call(x, False)

for step in range(2):
    engine.backward(losses(engine, mine))
    oracle.zero_grad()
    (sum(losses(plain, rows[2 * r : 2 * r + 2]) for r in range(world)) / world).backward()
    for (name, param), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        got = zeroxide.safe_get_full_grad(param)
        scale = expected.grad.abs().max()
        assert (got - expected.grad).abs().max() <= 1e-5 * scale, (name, step)
    engine.step()
    flag = os.path.join(os.environ["JOB_FOLDER"], f"alone-{step}")
    if case == "idle" and rank == 0:
        # Away, and back when the other rank has run a forward without it.
        while not os.path.exists(flag):
            time.sleep(0.01)
    if case == "idle" and rank == 1:
        with torch.no_grad():
            engine(mine, False)
        open(flag, "w").close()
    for param, expected in zip(model.parameters(), plain.parameters(), strict=True):
        expected.data = zeroxide.safe_get_full_fp32_param(param)
engine.destroy()
say("done")
"""


@pytest.mark.parametrize("transport", ["shared_memory", "collective"])
@pytest.mark.parametrize("case", ["twice", "forwards"])
def test_gradients_of_weights_used_more_than_once(case, transport):
    """Catches: a unit released or sent at its first gradient though a second one comes."""
    for result in run_ranks(2, JOB, [case, transport, "memory"]):
        assert result.out == "done\n", result.out + result.err[-3000:]


def test_an_idle_rank_keeps_nobody_waiting_for_its_part_of_a_step():
    """State on disk, weights one copy for all: the step has ended on every rank when it returns on any."""
    for result in run_ranks(2, JOB, ["idle", "shared_memory", "disk"], timeout=60):
        assert result.out == "done\n", result.out + result.err[-3000:]

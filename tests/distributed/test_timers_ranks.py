"""Times of two ranks: one prints, and a rank that waits for the other's gradients says so."""

from __future__ import annotations

import json

import pytest
from launching import run_ranks

LATE = 0.3
JOB = f"""
import json
from torch import nn
import zeroxide

class Late(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))

    def forward(self, x):
        # The first rank has computed its last gradient, the second has slept before its first.
        if ranks.rank == 0:
            x.register_hook(lambda grad: say("AT", time.perf_counter()))
        y = self.layers(x)
        if ranks.rank == 1:
            y.register_hook(sleep)
        return y.sum()

def sleep(grad):
    time.sleep({LATE})
    say("AT", time.perf_counter())

config = {{
    "gradient_clipping": 1.0,
    "wall_clock_breakdown": True,
    "zero_optimization": {{"stage": 2}},
    "zeroxide": {{"transport": sys.argv[1]}},
}}
engine, *_ = zeroxide.initialize(model=Late(), config=config, lr=0.1)
loss = engine(torch.ones(2, 8, requires_grad=True))
ranks.barrier()
start = time.perf_counter()
engine.backward(loss)
end = time.perf_counter()
engine.step()
say("FOUND " + json.dumps([engine.get_wall_clock_timers(), start, end]))
engine.destroy()
"""


@pytest.mark.parametrize("transport", ["collective", "shared_memory"])
def test_waiting_for_gradients_is_bwd_allreduce(transport):
    """Catches: the exchange timed as the rest of backward, or not at all; a second rank that prints."""
    results = run_ranks(2, JOB, [transport])
    assert [result.code for result in results] == [0, 0], results[0].err
    (first, start, end), (second, late_start, late_end) = (
        json.loads(line.removeprefix("FOUND "))
        for result in results
        for line in result.out.splitlines()
        if line.startswith("FOUND ")
    )
    computed, slept = (
        float(line.split()[1]) for result in results for line in result.out.splitlines() if line.startswith("AT ")
    )
    assert first["bwd"] <= (end - start) * 1e3
    assert first["bwd_inner"] + first["bwd_allreduce"] == pytest.approx(first["bwd"], abs=1e-6)
    assert second["bwd_inner"] >= LATE * 1e3
    assert second["bwd"] <= (late_end - late_start) * 1e3
    # On one clock: from its last gradient on rank 0 has little to do but to wait until rank 1 has slept; half is for
    # that little.
    assert slept >= late_start + LATE
    assert first["bwd_allreduce"] >= 0.5 * (slept - computed) * 1e3
    assert first["bwd_allreduce"] > 0
    assert results[0].out.count("time (ms)") == 2
    assert results[1].out.count("time (ms)") == 0

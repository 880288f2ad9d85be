"""Optimizer state of which a part stays in host memory while the rest is on disk: the same bits, less over the disk."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zeroxide
from zeroxide.errors import BudgetError

WIDTH, LAYERS = 128, 6
UNIT = WIDTH * WIDTH * 10
"""Bytes of a layer's state in bf16: what makes its weight exact, and two moments in fp32."""


class Stack(nn.Module):
    """Layers of a list, each of which is a unit."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def trained(tmp_path, offload_param: str, offload_optimizer: str, pinned: int, steps: int = 4):
    """Weights, first moments, (read, written) bytes of the last step, and the plan."""
    torch.manual_seed(0)
    model = Stack(LAYERS, WIDTH)
    engine, *_ = zeroxide.initialize(
        model=model,
        lr=1e-2,
        dtype="bf16",
        offload_param=offload_param,
        offload_optimizer=offload_optimizer,
        config={"gradient_clipping": 1.0, "zeroxide": {"state_in_memory": pinned} if pinned else {}},
    )
    counts = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn((4, WIDTH), generator=generator).to(torch.bfloat16)
        engine.backward(engine(inputs).float().square().mean())
        engine.step()
        engine.finish_step()
        io = engine.io()
        counts.append((io["read_bytes"], io["write_bytes"]))
    found = {
        name: (
            zeroxide.safe_get_full_fp32_param(param).clone(),
            zeroxide.safe_get_full_optimizer_state(param, "exp_avg").clone(),
        )
        for name, param in model.named_parameters()
    }
    moved = tuple(after - before for before, after in zip(counts[-2], counts[-1], strict=True))
    plan = engine.plan()
    engine.destroy()
    return found, moved, plan


@pytest.mark.parametrize("weights_on_disk", [False, True])
@pytest.mark.parametrize("units", [1, 4, LAYERS])
def test_pinned_state_has_the_bits_of_any_home(tmp_path, units, weights_on_disk):
    home = f"nvme:{tmp_path}"
    expected, _, _ = trained(tmp_path, "cpu", "cpu", 0)
    param = home if weights_on_disk else "cpu"
    # Room for so many layers and a little, in which no other fits.
    found, moved, plan = trained(tmp_path, param, home, units * UNIT + UNIT // 2)
    for name, (weight, moment) in expected.items():
        assert torch.equal(found[name][0], weight), name
        assert torch.equal(found[name][1], moment), name
    assert plan.numbers.states == ["host"] * units + ["disk"] * (LAYERS - units)
    assert plan.buckets["optimizer"] == units * UNIT
    live = LAYERS * WIDTH * WIDTH * 2 if weights_on_disk else 0
    read, written = plan.expected_traffic()
    assert moved[1] == written
    # A step that is ended before the next forward reads weights for itself, which otherwise are read once for both.
    assert read <= moved[0] <= read + live
    assert moved[1] == (LAYERS - units) * UNIT + live


def test_a_plan_says_how_much_of_the_state_is_where(tmp_path):
    home = f"nvme:{tmp_path}"
    _, _, plan = trained(tmp_path, "cpu", home, 3 * UNIT, steps=2)
    assert "optimizer state in files, 50 % of it in host memory" in "\n".join(plan.describe())


def test_a_budget_that_pinned_state_exceeds_says_so(tmp_path):
    model = Stack(16, 2048)
    with pytest.raises(BudgetError, match=r"to help: lower zeroxide\.state_in_memory") as caught:
        zeroxide.initialize(
            model=model,
            lr=1e-3,
            dtype="bf16",
            offload=f"nvme:{tmp_path}",
            host_memory="400MiB",
            config={"zeroxide": {"state_in_memory": "1GiB"}},
        )
    assert caught.value.bucket == "optimizer"

"""Whoever uses a weight on a device that has it for a while only, it is there: plain torch's bits, and no race."""

from __future__ import annotations

import pytest
import torch
from weight_uses import WAYS

import zeroxide
from simulated import engines

CELLS = "torch's cell on anything but a CPU is a kernel of GPUs, for which the host has no operator"
ATTENTION = "attention on the simulated device is composed of other operators than the host's"
NOT_HERE = {
    "a child's weight by numpy()": "torch gives no device's memory to numpy",
    "nn.TransformerEncoder, evaluated between steps": ATTENTION,
    "nn.TransformerEncoderLayer in a list": ATTENTION,
    "nn.LSTM": CELLS,
    "nn.LSTM with projections, both ways": CELLS,
    "nn.GRU": CELLS,
    "nn.LSTMCell stepped by hand": CELLS,
    "nn.RNN": "backward of a plain nn.RNN on the simulated device has other bits: torch composes it otherwise",
}
"""Ways that this device cannot show, and why."""


def there(value):
    return value.to("sim") if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", [each for each in WAYS if each not in NOT_HERE])
def test_unusual_use_of_weights_has_plain_torchs_bits(name, sim):
    sim.set_delay(0, 100, seed=3)
    small = WAYS[name]
    config = {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "gradient_clipping": 0,
        "zeroxide": {"threads": 1, "device": "sim"},
    }
    model, plain = small.build(), small.build()
    with engines.followed():
        engine, *_ = zeroxide.initialize(model=model, config=config)
        try:
            for seed in range(2):
                batch = small.batch(seed)
                torch.manual_seed(seed)
                with torch.device("sim"):
                    loss = small.loss(engine.module, small.call(engine, {n: there(v) for n, v in batch.items()}))
                    engine.backward(loss)
                torch.manual_seed(seed)
                plain.zero_grad()
                wanted = small.loss(plain, small.call(plain, batch))
                wanted.backward()
                assert loss.item() == wanted.item()
                for (label, mine), param in zip(model.named_parameters(), plain.parameters(), strict=True):
                    found = zeroxide.safe_get_full_grad(mine)
                    same = (found is None) == (param.grad is None) and (found is None or torch.equal(found, param.grad))
                    assert same or not param.grad.any(), label
                engine.step()
                state = model.state_dict()
                with torch.no_grad():
                    for label, param in plain.named_parameters():
                        param.copy_(state[label])
        finally:
            engine.destroy()
    assert [str(each) for each in sim.races()] == []

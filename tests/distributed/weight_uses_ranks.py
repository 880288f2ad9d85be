"""Every rank trains models that use weights in unusual ways, on the same batch: gradients are then plain torch's.

Arguments: "collective" or "nvme", the units' size in bytes, then names of ways; without names, all.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / each) for each in ("zoo", "numerics", "")]

from weight_uses import WAYS

import zeroxide
from zeroxide.plan import discover
from zeroxide.zero.param import sharded_param_of

torch.set_num_threads(1)
home, unit_bytes = sys.argv[1], int(sys.argv[2])
discover.DEFAULT_UNIT_BYTES = unit_bytes
device = {"device": "nvme", "nvme_path": tempfile.mkdtemp()} if home == "nvme" else {"device": "none"}
config = {
    "zero_optimization": {"stage": 3, "offload_param": device},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "gradient_clipping": 0,
    "zeroxide": {"threads": 1, "transport": "auto" if home == "nvme" else "collective"},
}


def check_own_part(label: str, mine: torch.nn.Parameter, wanted: torch.Tensor | None) -> None:
    """This rank's part of a gradient against plain torch's; the ranks together see all of it, and exchange nothing."""
    found = zeroxide.safe_get_local_grad(mine)
    start, count = sharded_param_of(mine).own()
    if wanted is None:
        assert found is None, label
        return
    part = wanted.reshape(-1)[start : start + count]
    assert not part.any() if found is None else torch.equal(found, part), label


for name in sys.argv[3:] or WAYS:
    small = WAYS[name]
    model = small.build()
    plain = small.build()
    try:
        engine, *_ = zeroxide.initialize(model=model, config=config)
        for seed in range(2):
            # The sum of two equal gradients, halved, is each of them.
            torch.manual_seed(seed)
            loss = small.loss(engine.module, small.call(engine, small.batch(seed)))
            engine.backward(loss)
            torch.manual_seed(seed)
            plain.zero_grad()
            wanted = small.loss(plain, small.call(plain, small.batch(seed)))
            wanted.backward()
            assert torch.equal(loss.detach(), wanted.detach()), (
                f"loss {loss.item()!r}, plain torch has {wanted.item()!r}"
            )
            for (label, mine), param in zip(model.named_parameters(), plain.parameters(), strict=True):
                check_own_part(label, mine, param.grad)
            engine.step()
            if seed == 0:
                state = model.state_dict()
                with torch.no_grad():
                    for label, param in plain.named_parameters():
                        param.copy_(state[label])
        engine.destroy()
        print(f"same {name}", flush=True)
    except BaseException as error:
        print(f"failed {name}: {type(error).__name__}: {error}", flush=True)
        os._exit(1)

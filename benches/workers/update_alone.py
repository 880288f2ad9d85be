"""Update layers whose optimizer state is on disk, with next to nothing to compute in between: ../update_share.py.

One argument: a JSON object

    {"width": 2048, "layers": 16, "steps": 6, "format": "split", "directory": where the blocks go, "threads": 2}
"""

from __future__ import annotations

import json
import sys
import time

import process
import torch
from torch import nn

import zeroxide


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    width = spec["width"]
    engine, *_ = zeroxide.initialize(
        model=nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(spec["layers"]))),
        lr=1e-4,
        dtype="bf16",
        offload=f"nvme:{spec['directory']}",
        config={
            "gradient_clipping": 1.0,
            "zeroxide": {"format": spec["format"], "threads": spec["threads"], "gradients": "host"},
        },
    )
    inputs = torch.ones((1, width), dtype=torch.bfloat16)
    steps = []
    for _ in range(spec["steps"]):
        engine.backward(engine(inputs).float().sum())
        before, begun = process.disk(), time.perf_counter()
        engine.step()
        engine.finish_step()
        seconds, after = time.perf_counter() - begun, process.disk()
        steps.append({"seconds": seconds, **{key: after[key] - before[key] for key in after}})
    engine.destroy()
    process.emit({"steps": steps, "parameters": spec["layers"] * width * width})


if __name__ == "__main__":
    main()

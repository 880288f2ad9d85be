"""Reads of weights by views that outlived the use of their unit, where each rank has a part of it.

Arguments: "collective" or "nvme", then which reads.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import zeroxide
from zeroxide.errors import ModelError
from zeroxide.plan import discover

WIDTH, LAYERS = 64, 6
torch.set_num_threads(1)
torch.manual_seed(0)
home, case = sys.argv[1:]
discover.DEFAULT_UNIT_BYTES = 8
device = {"device": "nvme", "nvme_path": tempfile.mkdtemp()} if home == "nvme" else {"device": "none"}
model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
engine, *_ = zeroxide.initialize(
    model=model,
    config={
        "zero_optimization": {"stage": 3, "offload_param": device},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zeroxide": {"threads": 1, "transport": "auto" if home == "nvme" else "collective"},
    },
)
kept: dict[int, torch.Tensor] = {}


def keep(index: int, layer: nn.Module) -> Any:
    """A hook that keeps what the layer computes with."""
    return layer.register_forward_hook(lambda module, args, output: kept.update({index: module.weight.detach()}))


def step() -> None:
    """Trains a little."""
    engine.backward(engine(torch.ones(2, WIDTH)).square().mean())
    engine.step()


handles = [keep(index, layer) for index, layer in enumerate(model)]
step()
for handle in handles:
    # From here on nothing is held but what hooks gather.
    handle.remove()
first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
step()
now = {name: tensor.clone() for name, tensor in model.state_dict().items()}
assert all(not torch.equal(now[name], first[name]) for name in now)
found: dict[int, object] = {}


def late(module: nn.Module, args: object) -> None:
    """One rank is behind, so its parts of what comes next have not arrived at the other's first read."""
    if engine.global_rank == 1:
        time.sleep(0.5)


def read(after: int, layers: Sequence[int], act: Callable[[torch.Tensor], object]) -> None:
    """Reads views of `layers`, in that order, when layer number `after` has run."""
    model[after].register_forward_hook(lambda module, args, output: found.update({at: act(kept[at]) for at in layers}))


if case == "while parts arrive":
    model[1].register_forward_pre_hook(late, prepend=True)
    read(1, range(2, LAYERS), torch.Tensor.clone)
    engine(torch.ones(2, WIDTH))
    for at, tensor in found.items():
        assert torch.equal(tensor, now[f"{at}.weight"]), f"layer {at} has parts of another step"
elif case == "after a step":
    # Memory that the last backward used is still under layers that this pass has not reached.
    read(0, [2, 1, 3, 4, 5, 0], torch.Tensor.clone)
    for _ in range(3):
        engine(torch.ones(2, WIDTH))
        wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for at, tensor in found.items():
            assert torch.equal(tensor, wanted[f"{at}.weight"]), f"layer {at} has values of another step"
        step()
elif case == "outside of a pass":
    step()
    with pytest.raises(ModelError, match=r"weights of .* several ranks"):
        # What is read is zero, and whatever the engine does next says so.
        engine(torch.stack([tensor.sum() for tensor in kept.values()]).sum().expand(2, WIDTH))
elif case == "all of them outside of a pass":
    # More than have room at once; whoever keeps no view has kept nothing.
    vector = nn.utils.parameters_to_vector(model.parameters())
    assert torch.equal(vector, torch.cat([tensor.flatten() for tensor in now.values()]))
    norms = torch._foreach_norm(list(model.parameters()))
    assert all(map(torch.equal, norms, torch._foreach_norm(list(now.values()))))
    vector.square().sum().backward()
elif case == "looked at in backward":
    model[4].register_full_backward_hook(lambda *_: found.update(enumerate(p.data.norm() for p in model.parameters())))
    step()
    assert all(map(torch.equal, found.values(), (tensor.norm() for tensor in now.values())))
elif case == "after the end":
    engine.destroy()
    for at, tensor in kept.items():
        assert bool(tensor.isnan().all()) or torch.equal(tensor, now[f"{at}.weight"]), at
else:
    # More than have room, so that some are away.
    read(1, range(2, LAYERS), torch.Tensor.tolist)
    begun = time.monotonic()
    with pytest.raises(ModelError, match="Python's lock"):
        engine(torch.ones(2, WIDTH))
    assert time.monotonic() - begun < 60
engine.destroy()

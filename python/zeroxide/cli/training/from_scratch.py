"""Initial weights as the model's own class would draw them, one parameter at a time.

Each parameter is drawn under a seed made from the run's seed and the parameter's name. Its value therefore depends on
nothing else: not on how parameters are grouped into units, not on the order in which units are filled, not on how many
there are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from zeroxide.cli.training.models import modules_with_initializers
from zeroxide.device.placement import HOST
from zeroxide.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FromScratch"]

_DONE = "_is_hf_initialized"  # the mark by which transformers' initialisers know what to leave alone


class FromScratch:
    """A weight source that runs the model's `_init_weights` in fp32."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self._seed = seed
        self._modules: dict[str, tuple[torch.nn.Module, Any]] = {
            name: (module, initializer) for name, module, initializer in modules_with_initializers(model)
        }

    def fill(self, tensors: dict[str, torch.Tensor], modules: dict[str, torch.nn.Module]) -> None:
        """Fill `tensors` (full parameter name -> fp32 CPU tensor) in place. `modules` are not needed here."""
        from transformers.initialization import guard_torch_init_functions

        del modules
        for name, tensor in tensors.items():
            # What no initialiser writes would otherwise be whatever the memory held before.
            tensor.fill_(float("nan"))
            with torch.no_grad(), torch.random.fork_rng(devices=[]), guard_torch_init_functions():
                torch.manual_seed(self._seed_of(name))
                self._initialize(name, tensor)
            if math.isnan(float(tensor.sum())):
                raise ModelError(f"the parameter {name} is not set by the model's initialisation", name=name)

    def pieces(self, name: str, shape: torch.Size) -> Iterator[tuple[int, torch.Tensor]]:
        """The parameter's values in one piece (0, flat fp32 CPU tensor): initialisers draw it whole."""
        tensor = torch.empty(shape, dtype=torch.float32, device=HOST)
        self.fill({name: tensor}, {})
        yield 0, tensor.view(-1)

    def _initialize(self, name: str, tensor: torch.Tensor) -> None:
        owner_name, _, key = name.rpartition(".")
        owner = self._modules[owner_name][0]
        placed = owner._parameters[key]
        real = torch.nn.Parameter(tensor, requires_grad=False)
        # From the owner outwards, as the model itself would go: an enclosing block may scale what a layer drew.
        chain = [self._modules[path] for path in _path_outwards(owner_name)]
        others = {id(p): p for module, _ in chain for p in module.parameters() if p is not placed}
        marked = [p for p in others.values() if not getattr(p, _DONE, False)]
        owner._parameters[key] = real
        try:
            for parameter in marked:
                setattr(parameter, _DONE, True)
            for module, initializer in chain:
                initializer(module)
        finally:
            owner._parameters[key] = placed
            for parameter in marked:
                delattr(parameter, _DONE)

    def _seed_of(self, name: str) -> int:
        digest = hashlib.blake2b(f"initial weights {self._seed} {name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


def _path_outwards(name: str) -> list[str]:
    """Return `a.b`, `a` and the root for `a.b`."""
    names = [name]
    while name:
        name = name.rpartition(".")[0]
        names.append(name)
    return names

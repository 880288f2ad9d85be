"""What each layer of a row takes, measured where it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from zeroxide.errors import ConfigError, ModelError
from zeroxide.parallel.pipe.nesting import flatten, rebuild

__all__ = ["measure_layers", "told_by_rank_0"]

ROUNDS = 3
"""Times that a layer is run; the fastest counts."""


def measure_layers(layers: Sequence[Callable[[], Callable[[Any], Any]]], given: Any) -> list[float]:
    """Seconds that forward and backward of each layer take on rank 0, by what each takes from the one before.

    layers: what makes each. One is there at a time, on rank 0 alone. given: what the first takes. Raises ConfigError
    without it.
    """
    if given is None:
        raise ConfigError(
            "PipelineModule: partition_method 'profile' measures what layers take: give profile_input, a micro-batch "
            "as the first layer takes it",
            path="pipeline.partition",
        )
    return told_by_rank_0(lambda: _measured(layers, given))


def told_by_rank_0(measure: Callable[[], list[float]]) -> list[float]:
    """What `measure` gives on rank 0, on every rank."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return measure()
    from zeroxide.distributed import start

    ranks = start()
    try:
        found: list[Any] = [None, None]
        if ranks.rank == 0:
            try:
                found = [measure(), None]
            except Exception as error:
                # The others wait for what is measured.
                found = [None, f"{type(error).__name__}: {error}"]
        seconds, failure = ranks.gather_objects(found)[0]
    finally:
        ranks.close()
    if failure is not None:
        raise ModelError(f"measuring what layers take failed on rank 0: {failure}")
    told: list[float] = seconds
    return told


def _measured(layers: Sequence[Callable[[], Callable[[Any], Any]]], given: Any) -> list[float]:
    seconds = []
    state = torch.get_rng_state()
    for make in layers:
        layer = make()
        best, output = float("inf"), None
        for _ in range(ROUNDS):
            structure, tensors = flatten(given, "profile_input")
            fresh = [each.detach().requires_grad_(each.is_floating_point() or each.is_complex()) for each in tensors]
            began = time.perf_counter()
            output = layer(rebuild(structure, fresh))
            outputs = [each for each in flatten(output, "what a layer gives")[1] if each.requires_grad]
            if outputs:
                torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])
            best = min(best, time.perf_counter() - began)
        for param in layer.parameters() if isinstance(layer, torch.nn.Module) else ():
            param.grad = None
        seconds.append(best)
        given = output
    torch.set_rng_state(state)
    return seconds

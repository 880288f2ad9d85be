"""The random numbers that micro-batches draw.

Each generator is one for the process: torch's for host memory, Python's and numpy's. Micro-batches that go through the
model layer by layer draw from them in another order than one after the other, so either nobody draws, or each
micro-batch has numbers of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from zeroxide.device.placement import HOST, forked_generators
from zeroxide.errors import ModelError

__all__ = ["NoneDrawn", "OwnNumbers", "State", "draw_seeds", "of_seed"]


class State:
    """What the three generators will give next."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        self.python = random.getstate()
        self.numpy: dict[str, Any] = np.random.get_state(legacy=False)

    def restore(self) -> None:
        """Has them give it again."""
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def drawn_from(self) -> str | None:
        """The name of a generator that something was drawn from since; None where nothing was."""
        if not torch.equal(torch.get_rng_state(), self.torch):
            return "torch's"
        if random.getstate() != self.python:
            return "Python's"
        return None if _same(np.random.get_state(legacy=False), self.numpy) else "numpy's"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return all(_same(value, other[name]) for name, value in one.items())
    return bool(np.array_equal(one, other))


def draw_seeds(count: int) -> list[int]:
    """Seeds for micro-batches, drawn from torch's generator."""
    return [int(seed) for seed in torch.randint(0, 2**62, (count,), device=HOST)]


@contextmanager
def of_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Within it the generators, that of `device` among them, give what comes of the seed; then what they would have."""
    before = State()
    with forked_generators(device):
        torch.manual_seed(seed)
        _seed_python(seed)
        try:
            yield
        finally:
            before.restore()


def _seed_python(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)


class NoneDrawn:
    """No forward draws, or it is refused by name."""

    def __init__(self) -> None:
        self._start = State()

    def suspend(self, number: int, where: str, *, forward: bool) -> None:
        """Raises ModelError where a forward has drawn."""
        found = self._start.drawn_from() if forward else None
        if found is not None:
            raise ModelError(
                f"forward of micro-batch {number} drew from {found} random number generator before it came to {where} "
                'or there; with zeroxide.accumulation_order "layers" others draw in between, and results would not be '
                "those of one micro-batch after the other: set zeroxide.micro_batch_seeds, with which each has random "
                "numbers of its own, or take dropout out"
            )

    def resume(self, number: int) -> None:
        """Nothing is to be done."""

    def end(self) -> None:
        """Nothing is to be undone."""


class OwnNumbers:
    """Each micro-batch draws from generators of its own."""

    def __init__(self, seeds: list[int]) -> None:
        self._outside = State()
        self._states: list[State] = []
        for seed in seeds:
            torch.default_generator.manual_seed(seed)
            _seed_python(seed)
            self._states.append(State())
        self._outside.restore()

    def suspend(self, number: int, where: str, *, forward: bool) -> None:
        """Keeps the generators for when the micro-batch goes on."""
        self._states[number] = State()

    def resume(self, number: int) -> None:
        """Gives it its own."""
        self._states[number].restore()

    def end(self) -> None:
        """The generators are everybody's again."""
        self._outside.restore()

"""How micro-batches add up to optimizer steps: sizes, boundaries and what has been counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.autograd import Variable

from zeroxide.config import Config
from zeroxide.errors import ConfigError
from zeroxide.precision.loss_scale import LossScaler

__all__ = ["Accumulation", "Counters", "Divided", "micro_batch_of"]


@dataclass
class Counters:
    """What training has counted since it began, resumed runs included."""

    global_steps: int = 0
    """Optimizer steps, those that were left out among them."""
    skipped_steps: int = 0
    """Optimizer steps that were left out, since a gradient was not finite."""
    micro_steps: int = 0
    """Calls of `step`."""
    samples: int = 0
    """Samples of all optimizer steps over all ranks, each forward one sample where the config gives no batch size."""


class Divided(Protocol):
    """What takes gradients and divides them."""

    divisor: int


class Accumulation:
    """Batch sizes, and where one optimizer step ends and the next one begins.

    A window is the micro-batches of one optimizer step. Without a batch size in the config training works all the
    same, since a forward takes what it is given; only what is made of that number is refused.
    """

    def __init__(self, config: Config, world: int, counters: Counters, gradients: Divided) -> None:
        self.steps = config.batch.gradient_accumulation_steps
        """Micro-batches per optimizer step."""
        self.world = world
        """Ranks that take different samples."""
        self.counters = counters
        self.boundary: bool | None = None
        """What the caller said of the next `step`; None leaves it to the config."""
        self.stepping = False
        """Whether a call of `step` is under way."""
        self._managed = config.batch.managed_gradient_accumulation
        self._micro_batch = config.batch.train_micro_batch_size_per_gpu
        self._train_batch = config.batch.train_batch_size
        self._gradients = gradients
        self._window_start = 0
        """`micro_steps` when the number of steps in a window last changed: windows are counted from there."""
        self._backwards = 0
        """Calls of `backward` since the last optimizer step."""
        self.divide_gradients()

    # Sizes ----------------------------------------------------------------------------------------------------------

    @property
    def micro_batch(self) -> int:
        """Samples per forward. Raises ConfigError where the config gives no batch size."""
        return _given(self._micro_batch)

    @property
    def train_batch(self) -> int:
        """Samples per optimizer step over all ranks. Raises ConfigError where the config gives no batch size."""
        return self._train_batch or self.micro_batch * self.steps * self.world

    @property
    def samples_of_step(self) -> int | None:
        """`train_batch`, None where the config gives no batch size."""
        return None if self._micro_batch is None else self.train_batch

    def set_train_batch(self, samples: int) -> None:
        """Changes the samples per optimizer step by changing the number of micro-batches; their size stays.

        Raises ConfigError for a number that is no multiple of the samples of one forward over all ranks, and in the
        middle of a window, whose gradients are divided by the number of before.
        """
        unit = self.micro_batch * self.world
        _check_size("train_batch_size", samples)
        if samples % unit:
            raise ConfigError(
                f"train_batch_size = {samples} is not a multiple of {unit}, the samples of one forward over "
                f"{self.world} ranks",
                path="train_batch_size",
                expected=f"a multiple of {unit}",
                got=str(samples),
            )
        self._check_between_windows()
        self._train_batch, self.steps = samples, samples // unit
        self._begin_windows()

    def set_micro_batch(self, samples: int) -> None:
        """Changes the samples per forward; the number of forwards per optimizer step stays. Raises ConfigError."""
        _check_size("train_micro_batch_size_per_gpu", samples)
        self._check_between_windows()
        self._micro_batch, self._train_batch = samples, samples * self.steps * self.world
        self._begin_windows()

    def _check_between_windows(self) -> None:
        if self.inside_window():
            raise ConfigError(
                f"batch sizes cannot change after {self.inside_window()} of {self.steps} "
                "micro-batches: change them after the step that updates the weights",
                path="train_batch_size",
            )

    def _begin_windows(self) -> None:
        self._window_start = self.counters.micro_steps
        self.divide_gradients()

    # Boundaries -----------------------------------------------------------------------------------------------------

    def inside_window(self) -> int:
        """Micro-batches since the last optimizer step, 0 where the caller owns the boundary."""
        if self.boundary is not None or not self._managed:
            return 0
        return (self.counters.micro_steps - self._window_start) % self.steps

    def is_boundary(self) -> bool:
        """Whether the next `step` updates the weights; without managed accumulation, whether a `step` is under way,
        since each is a boundary and nothing else is."""
        if self.boundary is not None:
            return self.boundary
        if not self._managed:
            return self.stepping
        return self.inside_window() + 1 == self.steps

    def count_backward(self) -> None:
        """Adds one call of `backward`."""
        self._backwards += 1

    def count_step(self) -> None:
        """Adds one optimizer step and its samples."""
        forwards = self.steps if self._managed else self._backwards
        self.counters.global_steps += 1
        self.counters.samples += (self._micro_batch or 1) * forwards * self.world
        self._backwards = 0

    def resume(self, saved: Counters) -> None:
        """Goes on from `saved`. A checkpoint is between two steps, whatever their number of micro-batches is now."""
        self.counters.__dict__.update(saved.__dict__)
        self._window_start = saved.micro_steps

    # Division -------------------------------------------------------------------------------------------------------

    def divide_gradients(self) -> None:
        """From now on gradients are those of a loss that nobody divided by the accumulation steps."""
        self._gradients.divisor = self.steps

    def take_as_divided(self) -> None:
        """From now on gradients are those of a loss that was divided, or is not to be."""
        self._gradients.divisor = 1

    def scale(self, loss: torch.Tensor, scaler: LossScaler) -> torch.Tensor:
        """The loss over the accumulation steps, times the loss scale, whose backward leaves gradients undivided."""
        if self.steps == 1 or not loss.requires_grad:
            return scaler.apply(loss)
        # Before the scale and forward's low dtype, so that the bits are those of `engine.backward`.
        scaled = scaler.apply(loss / self.steps)
        scaled.register_hook(self._note_divided)  # type: ignore[no-untyped-call]
        return scaled

    def _note_divided(self, grad: torch.Tensor) -> None:
        self.take_as_divided()
        Variable._execution_engine.queue_callback(self.divide_gradients)


def _check_size(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: expected an integer of at least 1, got {value!r}", path=name, got=repr(value))


def _given(micro_batch: int | None) -> int:
    if micro_batch is None:
        raise ConfigError(
            "no batch size: the config has neither train_micro_batch_size_per_gpu nor train_batch_size; give one of "
            'them, for example config={"train_micro_batch_size_per_gpu": 1}',
            path="train_micro_batch_size_per_gpu",
        )
    return micro_batch


def micro_batch_of(config: Config) -> int:
    """Samples per forward. Raises ConfigError where the config gives no batch size."""
    return _given(config.batch.train_micro_batch_size_per_gpu)

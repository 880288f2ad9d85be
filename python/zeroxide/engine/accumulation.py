"""How micro-batches add up to optimizer steps: sizes, boundaries and what has been counted."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import Variable

from zeroxide.config import Config
from zeroxide.distributed import Ranks
from zeroxide.errors import ConfigError
from zeroxide.precision.loss_scale import LossScaler

if TYPE_CHECKING:
    from zeroxide.zero.hooks import Hooks

__all__ = ["Accumulation", "micro_batch_of"]


class Accumulation:
    """The engine's methods about batch sizes and accumulation, under DeepSpeed's names.

    A window is the micro-batches of one optimizer step. Without a batch size in the config training works all the
    same, since a forward takes what it is given; only what is made of that number is refused.
    """

    config: Config
    ranks: Ranks
    micro_steps: int
    _hooks: Hooks
    _scaler: LossScaler
    _boundary: bool | None
    """What the caller said of the next `step`; None leaves it to the config."""
    _stepping: bool
    """Whether a call of `step` is under way."""
    _window_start: int
    """`micro_steps` when the number of steps in a window last changed: windows are counted from there."""
    _samples: int
    """As `global_samples`, each forward one sample where the config gives no batch size."""
    _backwards: int
    """Calls of `backward` since the last optimizer step."""

    def _begin_counting(self) -> None:
        self.micro_steps = 0
        self._boundary = None
        self._stepping = False
        self._window_start = 0
        self._samples = 0
        self._backwards = 0

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self.config.batch.gradient_accumulation_steps

    def train_batch_size(self) -> int:
        """Samples per optimizer step over all ranks. Raises ConfigError where the config gives no batch size."""
        return self.config.batch.train_batch_size or (
            self.train_micro_batch_size_per_gpu() * self.gradient_accumulation_steps() * self.ranks.world
        )

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per forward. Raises ConfigError where the config gives no batch size."""
        return micro_batch_of(self.config)

    def get_batch_info(self) -> tuple[int, int, int]:
        """(samples per optimizer step, samples per forward, forwards per optimizer step).

        Raises ConfigError where the config gives no batch size.
        """
        return self.train_batch_size(), self.train_micro_batch_size_per_gpu(), self.gradient_accumulation_steps()

    @property
    def global_samples(self) -> int:
        """Samples of all optimizer steps so far, over all ranks. Raises ConfigError where the config gives no batch
        size."""
        micro_batch_of(self.config)
        return self._samples

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Changes the samples per optimizer step by changing the number of micro-batches; their size stays.

        Raises ConfigError for a number that is no multiple of the samples of one forward over all ranks, and in the
        middle of a window, whose gradients are divided by the number of before.
        """
        unit = self.train_micro_batch_size_per_gpu() * self.ranks.world
        _check_size("train_batch_size", train_batch_size)
        if train_batch_size % unit:
            raise ConfigError(
                f"train_batch_size = {train_batch_size} is not a multiple of {unit}, the samples of one forward over "
                f"{self.ranks.world} ranks",
                path="train_batch_size",
                expected=f"a multiple of {unit}",
                got=str(train_batch_size),
            )
        self._resize(train_batch_size=train_batch_size, gradient_accumulation_steps=train_batch_size // unit)

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Changes the samples per forward; the number of forwards per optimizer step stays. Raises ConfigError.

        The engine's own data loader goes on with the size that it was made with.
        """
        _check_size("train_micro_batch_size_per_gpu", micro_batch_size)
        steps = self.gradient_accumulation_steps()
        self._resize(
            train_micro_batch_size_per_gpu=micro_batch_size,
            train_batch_size=micro_batch_size * steps * self.ranks.world,
        )

    def _resize(self, **changed: Any) -> None:
        if self._inside_window():
            raise ConfigError(
                f"batch sizes cannot change after {self._inside_window()} of {self.gradient_accumulation_steps()} "
                "micro-batches: change them after the step that updates the weights",
                path="train_batch_size",
            )
        self.config = dataclasses.replace(self.config, batch=dataclasses.replace(self.config.batch, **changed))
        self._window_start = self.micro_steps
        self._divide_gradients()

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the loss scale, for `engine.scale(loss).backward()`; without fp16 the loss itself.

        As with any `backward` of torch's own, gradients are those of the loss divided by the accumulation steps.
        """
        if self.gradient_accumulation_steps() == 1 or not loss.requires_grad:
            return self._scaler.apply(loss)
        # Before the scale and forward's low dtype, so that the bits are those of `engine.backward`.
        scaled = self._scaler.apply(loss / self.gradient_accumulation_steps())
        scaled.register_hook(self._note_divided)  # type: ignore[no-untyped-call]
        return scaled

    def _note_divided(self, grad: torch.Tensor) -> None:
        self._hooks.reducer.divisor = 1
        Variable._execution_engine.queue_callback(self._divide_gradients)

    def _divide_gradients(self) -> None:
        """From now on gradients are those of a loss that nobody divided by the accumulation steps."""
        self._hooks.reducer.divisor = self.gradient_accumulation_steps()

    def _inside_window(self) -> int:
        """Micro-batches since the last optimizer step, 0 where the caller owns the boundary."""
        if self._boundary is not None or not self.config.batch.managed_gradient_accumulation:
            return 0
        return (self.micro_steps - self._window_start) % self.gradient_accumulation_steps()

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next `step` updates the weights; with `managed_gradient_accumulation` false, whether a `step` is
        under way, since each is a boundary and nothing else is."""
        if self._boundary is not None:
            return self._boundary
        if not self.config.batch.managed_gradient_accumulation:
            return self._stepping
        return self._inside_window() + 1 == self.gradient_accumulation_steps()

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Decides from outside whether `step` updates the weights; None goes back to what the config says.

        That is counting, or with `managed_gradient_accumulation` false an update at every `step`.
        """
        self._boundary = is_boundary

    def _count_step(self) -> None:
        """Adds the samples of one optimizer step."""
        forwards = self.gradient_accumulation_steps()
        if not self.config.batch.managed_gradient_accumulation:
            forwards = self._backwards
        self._samples += (self.config.batch.train_micro_batch_size_per_gpu or 1) * forwards * self.ranks.world
        self._backwards = 0


def _check_size(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: expected an integer of at least 1, got {value!r}", path=name, got=repr(value))


def micro_batch_of(config: Config) -> int:
    """Samples per forward. Raises ConfigError where the config gives no batch size."""
    if config.batch.train_micro_batch_size_per_gpu is None:
        raise ConfigError(
            "no batch size: the config has neither train_micro_batch_size_per_gpu nor train_batch_size; give one of "
            'them, for example config={"train_micro_batch_size_per_gpu": 1}',
            path="train_micro_batch_size_per_gpu",
        )
    return config.batch.train_micro_batch_size_per_gpu

"""What watches training without a part in it: monitors, the logs of steps and collectives, the FLOPs profiler."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zeroxide.config import Config
from zeroxide.distributed import COMMS, Ranks
from zeroxide.engine.step_profiler import StepProfiler
from zeroxide.engine.timers import Timers
from zeroxide.errors import ConfigError
from zeroxide.monitor import Event, Monitor, open_writers

__all__ = ["Observers", "StepFacts", "open_observers"]

_TIMES = {
    "fwd": "forward",
    "bwd": "backward",
    "bwd_inner": "backward_inner",
    "bwd_allreduce": "backward_allreduce",
    "step": "step",
}
"""The timers that monitors have, with DeepSpeed's words for them in tags."""


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """What there is to say of one optimizer step when it has been made or left out."""

    step: int
    samples: int
    """Of all steps so far over all ranks: the x axis."""
    lr: float
    """Rate of the first group, after the schedule has moved on."""
    norm: float | None
    loss_scale: float | None
    """What the next loss is multiplied by; None without fp16."""
    applied: bool
    skipped: int
    """Steps left out so far."""
    redone: int | None = None
    """Steps made again so far, since backward had updated and the step clipped; None where backward does not so."""
    written: int | None = None
    """Bytes that this rank has written to disk so far; None where no state is there."""


class Observers:
    """All that watch one engine."""

    def __init__(self, monitor: Monitor, profiler: StepProfiler | None, about: Mapping[str, object]) -> None:
        self.monitor = monitor
        self.profiler = profiler
        self.about = about
        """What reports begin with."""
        self._loss: torch.Tensor | None = None
        """Sum of what `backward` was called with since the last optimizer step, on its device."""

    def note_loss(self, loss: torch.Tensor) -> None:
        """A backward of `loss` has been made, divided by the accumulation steps, without the loss scale."""
        if self.monitor.writes:
            value = loss.detach().float()
            self._loss = value if self._loss is None else self._loss + value

    def around_forward(
        self, module: nn.Module, device: torch.device, step: int, timers: Timers
    ) -> AbstractContextManager[None]:
        """A forward of `module` is made within it, after `step` optimizer steps."""
        return nullcontext() if self.profiler is None else self.profiler.around_forward(module, device, step, timers)

    def after_step(self, facts: StepFacts, timers: Timers, samples: int | None) -> None:
        """Tells all of a step, of `samples` samples if that is known. Waits for a loss that is on a device."""
        if self.profiler is not None:
            self.profiler.after_step(timers, self.about, samples)
        if not self.monitor.writes:
            return
        loss = None if self._loss is None else self._loss.item()
        self._loss = None
        times = timers.elapsed_of_step()
        self.monitor.write_step(_events(facts, loss, times), _record(facts, loss, times))

    def close(self) -> None:
        """Ends all of them."""
        self.monitor.close()


def _events(facts: StepFacts, loss: float | None, times: dict[str, float]) -> list[Event]:
    """By DeepSpeed's tags (runtime/engine.py:3627, 3729; of the loss, runtime/pipe/engine.py:393)."""
    values: list[tuple[str, float | None]] = [
        ("train_loss", loss),
        ("lr", facts.lr),
        ("loss_scale", facts.loss_scale),
        ("redone_steps", facts.redone),
        ("disk_written_bytes", facts.written),
        *((f"elapsed_time_ms_{word}", times.get(name)) for name, word in _TIMES.items()),
    ]
    return [(f"Train/Samples/{name}", value, facts.samples) for name, value in values if value is not None]


def _record(facts: StepFacts, loss: float | None, times: dict[str, float]) -> dict[str, Any]:
    """A line of the log of steps: what is not known is not in it."""
    record = {
        "step": facts.step,
        "samples": facts.samples,
        "loss": loss,
        "lr": facts.lr,
        "grad_norm": facts.norm,
        "loss_scale": facts.loss_scale,
        "applied": facts.applied,
        "skipped_steps": facts.skipped,
        "redone_steps": facts.redone,
        "disk_written_bytes": facts.written,
        "milliseconds": times or None,
    }
    return {name: value for name, value in record.items() if value is not None}


def open_observers(config: Config, ranks: Ranks) -> Observers:
    """What the config asks for; rank 0 alone opens anything. Every rank calls it.

    Raises ConfigError on all ranks where rank 0 cannot open what its config asks for.
    """
    COMMS.configure(config, ranks)
    problem: list[Any] | None = None
    monitor = Monitor(enabled=config.monitor.enabled or config.zeroxide.log is not None)
    if ranks.rank == 0:
        try:
            monitor = Monitor(open_writers(config), enabled=monitor.enabled)
        except ConfigError as error:
            problem = [str(error), error.path]
    found = [problem] if ranks.alone else ranks.gather_objects(problem)
    if found[0] is not None:
        line, path = found[0]
        raise ConfigError(line, path=path)
    profiler = None
    if ranks.rank == 0 and config.flops_profiler.enabled:
        profiler = StepProfiler(config)
    about = {"world size": ranks.world, "batch size per rank": config.batch.train_micro_batch_size_per_gpu or "-"}
    return Observers(monitor, profiler, about)

"""The FLOPs profiler of an engine: the first forward of one optimizer step, reported when that step has ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from zeroxide.config import Config
from zeroxide.engine.timers import Timers
from zeroxide.profiling import FlopsProfiler

__all__ = ["StepProfiler"]

logger = logging.getLogger("zeroxide")


@dataclass
class _Measured:
    """A step that is measured, or was."""

    profiler: FlopsProfiler
    start: float
    """When its first forward began."""
    seconds: dict[str, float]
    """The engine's timers then."""
    reported: bool = False


class StepProfiler:
    """Measures as the config says, once."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._measured: _Measured | None = None

    @contextmanager
    def around_forward(self, module: nn.Module, device: torch.device, step: int, timers: Timers) -> Iterator[None]:
        """A forward of `module` on `device`, after `step` optimizer steps. The first one in training of the step that
        is wanted is measured; one that fails is forgotten."""
        if self._measured is not None or step != self._config.flops_profiler.profile_step or not module.training:
            yield
            return
        factor = self._config.flops_profiler.recompute_fwd_factor
        profiler = FlopsProfiler(module, recompute_fwd_factor=factor, device=device)
        start, seconds = time.perf_counter(), dict(timers.seconds)
        profiler.start_profile()
        try:
            yield
        except BaseException:
            profiler.end_profile()
            raise
        profiler.stop_profile()
        self._measured = _Measured(profiler, start, seconds)

    def after_step(self, timers: Timers, facts: Mapping[str, object], samples: int | None) -> None:
        """An optimizer step has been made or left out. Reports the one that was measured, of `samples` samples over all
        ranks (None where the config gives no batch size)."""
        measured = self._measured
        if measured is None or measured.reported:
            return
        measured.reported = True
        seconds = {"iteration": time.perf_counter() - measured.start}
        # Of several micro-batches the timers have the sum.
        spent = {name: now - measured.seconds[name] for name, now in timers.seconds.items()}
        micro_batches = max(1, timers.backwards_of_step)
        seconds |= {"backward": spent["backward"] / micro_batches, "step": spent["step"]}
        if samples is not None:
            facts = {**facts, "samples/second": f"{samples / seconds['iteration']:.2f}"}
        path = self._config.flops_profiler.output_file
        output = None if path is None else str(path)
        try:
            self._print(measured.profiler, output, seconds, facts)
        except OSError as error:
            logger.warning("flops_profiler.output_file: cannot write to %s: %s; it is printed", output, error.strerror)
            self._print(measured.profiler, None, seconds, facts)
        measured.profiler.end_profile()

    def _print(
        self, profiler: FlopsProfiler, output: str | None, seconds: Mapping[str, float], facts: Mapping[str, object]
    ) -> None:
        profiler.print_model_profile(
            self._config.flops_profiler.profile_step,
            self._config.flops_profiler.module_depth,
            self._config.flops_profiler.top_modules,
            self._config.flops_profiler.detailed,
            output,
            seconds=seconds,
            facts=facts,
        )

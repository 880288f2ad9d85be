"""FLOPs, parameters and time of each module in one or more forwards.

Counted are matrix products, convolutions and attention, by the formulas of `torch.utils.flop_counter`: two operations a
multiply-accumulate, attention in full whatever its mask leaves out. What is done element by element is not counted. The
operations run as they would without: results have the same bits. Times are those of forward with the counting beside
it, and with the gathering of weights that a module waits for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zeroxide.device.placement import HOST, device_of, is_host, wait_for
from zeroxide.errors import ModelError
from zeroxide.params.handle import shape_of
from zeroxide.profiling.numbers import duration_to_string, macs_to_string, number_to_string, params_to_string
from zeroxide.profiling.report import aggregated, profile, show

__all__ = ["FlopsProfiler", "ModuleCost", "get_model_profile"]


@dataclass(slots=True)
class ModuleCost:
    """What a module has cost, everything in it included."""

    params: int
    """Elements of its parameters, each once, wherever their values are."""
    flops: int = 0
    seconds: float = 0.0


class _WholeModel:
    """Stands for torch's tracker of modules, which would hook into autograd: all counts under one name."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class FlopsProfiler:
    """Measures forwards of `model` between `start_profile` and `stop_profile`, with DeepSpeed's names.

    ds_engine, device: whose device, or which, is waited for before each time is taken; by default the model's own.
    recompute_fwd_factor: how much of forward is done again in backward, for the estimate of its FLOPs.
    """

    def __init__(
        self,
        model: nn.Module,
        ds_engine: Any = None,
        recompute_fwd_factor: float = 0.0,
        *,
        device: torch.device | None = None,
    ) -> None:
        self.model = model
        self.recompute_fwd_factor = recompute_fwd_factor
        self.started = False
        self.unsupported: dict[str, int] = {}
        """Operations that could not be counted, with how often they ran."""
        own = device_of(model) or HOST
        self._device = device or (own if ds_engine is None else ds_engine.device)
        self._costs: dict[int, ModuleCost] = {}
        self._handles: list[Any] = []
        self._open: list[tuple[nn.Module, int, float]] = []
        """Modules under way, with the FLOPs and the time at which they began."""
        self._counter: FlopCounterMode | None = None

    # Measuring ------------------------------------------------------------------------------------------------------

    def start_profile(self, ignore_list: Collection[type[nn.Module]] | None = None) -> None:
        """Begins to measure. Modules of the types in `ignore_list` get no numbers of their own; what they do counts
        for those that they are in. Raises ModelError where it has begun already."""
        if self._counter is not None:
            raise ModelError("start_profile: it has been started, and stop_profile was not called")
        self.reset_profile()
        ignored = tuple(ignore_list or ())
        for module in self.model.modules():
            if type(module) not in ignored and not isinstance(module, torch.jit.ScriptModule):
                self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
                self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        # A kernel that has no formula must run all the same.
        self._counter = FlopCounterMode(display=False, skip_unsupported=True)
        self._counter.mod_tracker = _WholeModel()  # type: ignore[assignment]
        self._counter.__enter__()  # type: ignore[no-untyped-call]
        self.started = True

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._counter is not None:
            self._open.append((module, self._counter.get_total_flops(), self._now()))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._counter is None or all(each is not module for each, _, _ in self._open):
            return
        # Of modules that were interrupted torch tells nothing.
        while (begun := self._open.pop())[0] is not module:
            pass
        if any(each is module for each, _, _ in self._open):
            return  # it has called itself, and is counted when the outermost call ends
        cost = self._costs[id(module)]
        cost.flops += self._counter.get_total_flops() - begun[1]
        cost.seconds += self._now() - begun[2]

    def _now(self) -> float:
        if not is_host(self._device):
            wait_for(self._device)
        return time.perf_counter()

    def stop_profile(self) -> None:
        """Ends measuring; what was measured stays. Does nothing where none is under way."""
        if self._counter is None:
            return
        counter, self._counter = self._counter, None
        counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self.unsupported = dict(counter.get_unsupported_ops())
        self._open.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def reset_profile(self) -> None:
        """Forgets what was measured."""
        self._costs = {
            id(module): ModuleCost(sum(shape_of(param).numel() for param in module.parameters()))
            for module in self.model.modules()
        }

    def end_profile(self) -> None:
        """Ends measuring and forgets what was measured."""
        self.stop_profile()
        self._costs.clear()
        self.started = False

    # Asking ---------------------------------------------------------------------------------------------------------

    def cost_of(self, module: nn.Module) -> ModuleCost:
        """What `module`, one of the model's, has cost. Raises ModelError before `start_profile`."""
        if id(module) not in self._costs:
            raise ModelError("nothing has been measured of the module: call start_profile before its forward")
        return self._costs[id(module)]

    def get_total_flops(self, as_string: bool = False) -> int | str:
        """Floating-point operations of the model's forwards."""
        flops = self.cost_of(self.model).flops
        return number_to_string(flops) if as_string else flops

    def get_total_macs(self, as_string: bool = False) -> int | str:
        """Multiply-accumulates of the model's forwards: half of the operations."""
        macs = self.cost_of(self.model).flops // 2
        return macs_to_string(macs) if as_string else macs

    def get_total_duration(self, as_string: bool = False) -> float | str:
        """Seconds in the model's forwards."""
        seconds = self.cost_of(self.model).seconds
        return duration_to_string(seconds) if as_string else seconds

    def get_total_params(self, as_string: bool = False) -> int | str:
        """Parameters of the model, those whose values are elsewhere included."""
        params = self.cost_of(self.model).params
        return params_to_string(params) if as_string else params

    def print_model_profile(
        self,
        profile_step: int = 1,
        module_depth: int = -1,
        top_modules: int = 1,
        detailed: bool = True,
        output_file: str | None = None,
        *,
        seconds: Mapping[str, float] | None = None,
        facts: Mapping[str, object] | None = None,
    ) -> None:
        """Prints what was measured, or writes it to `output_file`, whose folder is made.

        module_depth: how deep below the model modules are shown, -1 for all. top_modules: of how many kinds of modules
        the sums are shown at each depth. detailed: whether every module has a line. seconds: times of "backward",
        "step" and "iteration", for what follows from them. facts: lines to begin with. Does nothing before
        `start_profile`.
        """
        if not self.started:
            return
        text = profile(
            self.model,
            self.cost_of,
            step=profile_step,
            depth=module_depth,
            top=top_modules,
            detailed=detailed,
            backward_factor=2 + self.recompute_fwd_factor,
            seconds=seconds or {},
            facts=facts or {},
            unsupported=self.unsupported,
        )
        if not output_file:
            show(text)
            return
        path = Path(output_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")

    def print_model_aggregated_profile(self, module_depth: int = -1, top_modules: int = 1) -> None:
        """Prints, for each depth, the kinds of modules with the most parameters, MACs and time."""
        show("\n".join(aggregated(self.model, self.cost_of, module_depth, top_modules)))


def get_model_profile(
    model: nn.Module,
    input_shape: tuple[int, ...] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | None = None,
    ignore_modules: Collection[type[nn.Module]] | None = None,
    mode: str = "forward",
) -> tuple[int | str, int | str, int | str]:
    """(FLOPs, MACs, parameters) of one forward of `model`, in eval mode, in which it stays, as in DeepSpeed.

    input_shape: shape of a tensor of ones that is its only argument, instead of `args` and `kwargs`. warm_up: forwards
    before the one that is measured. mode: "forward" or "generate", the method that is called. Raises ValueError for
    another one, and without arguments.
    """
    if mode not in ("forward", "generate"):
        raise ValueError(f"mode: expected 'forward' or 'generate', got {mode!r}")
    if input_shape is not None:
        like = next(model.parameters(), torch.empty(0, device=HOST))
        args = [torch.ones(input_shape, dtype=like.dtype, device=like.device)]
    given = dict(kwargs or {})
    if not args and not given:
        raise ValueError("get_model_profile needs input_shape, args or kwargs")
    model.eval()
    call: Callable[..., Any] = model if mode == "forward" else model.generate  # type: ignore[assignment]
    for _ in range(warm_up):
        call(*args, **given)
    profiler = FlopsProfiler(model)
    profiler.start_profile(ignore_list=ignore_modules)
    try:
        call(*args, **given)
        profiler.stop_profile()
        if print_profile:
            profiler.print_model_profile(warm_up, module_depth, top_modules, detailed, output_file)
        return (
            profiler.get_total_flops(as_string),
            profiler.get_total_macs(as_string),
            profiler.get_total_params(as_string),
        )
    finally:
        profiler.end_profile()

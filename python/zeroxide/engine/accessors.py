"""What scripts ask of an engine: its settings, and what it has counted."""

from __future__ import annotations

from typing import Any

import torch

from zeroxide import _core
from zeroxide._core import Offload
from zeroxide.config import Config
from zeroxide.distributed import Ranks
from zeroxide.engine.peak import Peak
from zeroxide.plan.plan import Plan
from zeroxide.precision.loss_scale import LossScaler
from zeroxide.zero.exchange import Exchange

__all__ = ["Accessors"]


class Accessors:
    """The engine's methods about its settings and counts, under DeepSpeed's names where it has them."""

    config: Config
    optimizer: Any
    ranks: Ranks
    global_steps: int
    skipped_steps: int
    _applied: bool
    _core: Offload | None
    _exchange: Exchange
    _norm: float | None
    _peak: Peak
    _plan: Plan
    _scaler: LossScaler
    _times: dict[str, float]

    def _alive(self) -> Offload:
        if self._core is None:
            raise RuntimeError("the engine was destroyed")
        return self._core

    def get_global_grad_norm(self) -> torch.Tensor | None:
        """Norm of all gradients at the last step, before clipping and without the loss scale: fp64 of shape ().

        Infinity if the step was left out, since a gradient was not finite; NaN if it was made all the same. None before
        the first step, and with `zero_optimization.compute_grad_norm` false.
        """
        if self._norm is None or not self.config.zero.compute_grad_norm:
            return None
        return torch.tensor(self._norm, dtype=torch.float64)

    def get_lr(self) -> list[float]:
        """Learning rate of each group."""
        return [] if self.optimizer is None else [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_mom(self) -> list[tuple[float, float]]:
        """Adam's betas of each group."""
        return [] if self.optimizer is None else [tuple(group["betas"]) for group in self.optimizer.param_groups]

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of every group. A schedule overwrites it at its next step."""
        for group in () if self.optimizer is None else self.optimizer.param_groups:
            group["lr"] = lr

    def was_step_applied(self) -> bool:
        """Whether the last `step` changed the weights."""
        return self._applied

    def gradient_clipping(self) -> float:
        """Largest global gradient norm; 0 where gradients are left as they are."""
        return self.config.gradients.clipping or 0.0

    def steps_per_print(self) -> int | None:
        """Optimizer steps from one line of progress to the next; None for no lines."""
        return self.config.report.steps_per_print

    def wall_clock_breakdown(self) -> bool:
        """Whether those lines have times."""
        return self.config.report.wall_clock_breakdown

    @property
    def dp_world_size(self) -> int:
        """Ranks that share the data."""
        return self.ranks.world

    def zero_optimization_stage(self) -> int:
        """ZeRO stage of the config."""
        return self.config.zero.stage

    def zero_optimization(self) -> bool:
        """Whether ranks share the optimizer state: stage 1 or more."""
        return self.config.zero.stage >= 1

    def zero_optimization_partition_gradients(self) -> bool:
        """Whether ranks share gradients: stage 2 or more."""
        return self.config.zero.stage >= 2

    def zero_optimization_partition_weights(self) -> bool:
        """Whether ranks share weights: stage 3."""
        return self.config.zero.stage >= 3

    def bfloat16_enabled(self) -> bool:
        """Whether weights and activations are bf16."""
        return self.config.precision.dtype == "bf16"

    def fp16_enabled(self) -> bool:
        """Whether weights and activations are fp16."""
        return self.config.precision.dtype == "fp16"

    def loss_scale(self) -> float:
        """What the next loss will be multiplied by before backward; 1 without fp16."""
        return self._scaler.scale

    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale follows overflows."""
        return self._scaler.dynamic

    @property
    def config_params(self) -> dict[str, Any]:
        """The config as it was given, parsed."""
        return dict(self.config.source)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return torch.device("cpu")

    def plan(self) -> Plan:
        """Units, homes and expected bytes."""
        return self._plan

    def memory(self) -> dict[str, Any]:
        """Bytes per bucket as {"current", "peak"}, the process under "process", and the budget under "limit".

        The process's "peak" is the most that was resident since `initialize`, which resets the kernel's peak (so that
        `ru_maxrss` and `VmHWM` begin anew, too). Where the system does not allow that, a peak below that of before is
        known from samples only: at every step with a budget, and here; "exact" tells.
        """
        usage: dict[str, Any] = {
            name: {"current": current, "peak": peak} for name, (current, peak) in self._alive().usage().items()
        }
        usage["process"] = {**_core.resident(), "peak": self._peak.most(), "exact": self._peak.exact}
        usage["limit"] = self.config.zeroxide.host_memory
        return usage

    def io(self) -> dict[str, Any]:
        """Disk traffic since the start, in bytes and seconds.

        `read_seconds` and `write_seconds` are times with at least one such operation in flight, `wait_seconds` those in
        which compute stood still for the disk, and `update_seconds` those spent on optimizer steps, waiting included,
        also where that was within the next forward.
        """
        found = self._alive().io()
        if found is None:
            counts = dict.fromkeys(("read_bytes", "write_bytes", "reads", "writes", "tiles_updated"), 0)
            seconds = dict.fromkeys(("read_seconds", "write_seconds", "wait_seconds", "update_seconds"), 0.0)
            return {**counts, **seconds, "engine": "none"}
        return found

    def exchanged_bytes(self) -> int:
        """Bytes of weights and gradients that this rank has sent to others since the start, whatever carried them."""
        return self._exchange.sent_bytes

    def times(self) -> dict[str, float]:
        """Seconds spent in forward, backward and step since the start."""
        return dict(self._times)

    def _report(self) -> None:
        every = self.config.report.steps_per_print
        if not every or self.global_steps % every:
            return
        norm = "-" if self._norm is None else f"{self._norm:.3f}"
        line = f"[zeroxide] step {self.global_steps} lr {self.get_lr()[0]:.3e} grad norm {norm}"
        if self.skipped_steps:
            line += f" skipped {self.skipped_steps}"
        if self.config.report.wall_clock_breakdown:
            line += "".join(f" {name} {seconds:.2f} s" for name, seconds in self._times.items())
        print(line, flush=True)

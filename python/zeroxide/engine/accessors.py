"""What scripts ask of an engine: its settings, and what it has counted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from zeroxide import _core
from zeroxide.config import Config
from zeroxide.device.placement import HOST, empty_cache
from zeroxide.engine.optimizer import EngineOptimizer
from zeroxide.engine.parts import Parts
from zeroxide.engine.timers import Timers
from zeroxide.errors import ConfigError, ModelError
from zeroxide.monitor import Monitor
from zeroxide.plan.plan import Plan
from zeroxide.zero.on_device.core import device_part

__all__ = ["Accessors"]


class Accessors:
    """The engine's methods about its settings and counts, under DeepSpeed's names where it has them."""

    parts: Parts
    """What they all ask."""

    def get_global_grad_norm(self) -> torch.Tensor | None:
        """Norm of all gradients at the last step, before clipping and without the loss scale: fp64 of shape ().

        Infinity if the step was left out, since a gradient was not finite; NaN if it was made all the same. None before
        the first step, and with `zero_optimization.compute_grad_norm` false.
        """
        if self.parts.updater.norm is None or not self.parts.config.zero.compute_grad_norm:
            return None
        return torch.tensor(self.parts.updater.norm, dtype=torch.float64, device=HOST)

    def get_lr(self) -> list[float]:
        """Learning rate of each group."""
        return [float(group["lr"]) for group in self._groups()]

    def get_mom(self) -> list[tuple[float, float]]:
        """Adam's betas of each group."""
        return [tuple(group["betas"]) for group in self._groups()]

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of every group. A schedule overwrites it at its next step."""
        for group in self._groups():
            group["lr"] = lr

    def _groups(self) -> list[dict[str, Any]]:
        return [] if self.parts.optimizer is None else list(self.parts.optimizer.param_groups)

    def was_step_applied(self) -> bool:
        """Whether the last `step` changed the weights."""
        return self.parts.updater.applied

    def gradient_clipping(self) -> float:
        """Largest global gradient norm; 0 where gradients are left as they are."""
        return self.parts.updater.clipping or 0.0

    def set_gradient_clipping(self, max_norm: float) -> None:
        """Changes the largest global gradient norm from the next step on; 0 leaves gradients as they are.

        Every rank sets the same; the next step raises RanksError on all of them where one has not. Raises ConfigError
        for what is no finite number of at least 0.
        """
        if not math.isfinite(max_norm) or max_norm < 0:
            raise ConfigError(
                f"gradient_clipping: expected a finite number of at least 0, got {max_norm!r}",
                path="gradient_clipping",
                got=repr(max_norm),
            )
        self.parts.updater.clipping = float(max_norm) or None

    def measure_grad_norm(self) -> torch.Tensor:
        """Norm of all gradients since the last step, without the loss scale: fp64 of shape (); NaN where not finite.

        Every rank calls it. The next step finds the same.
        """
        return torch.tensor(self.parts.updater.measure(), dtype=torch.float64, device=HOST)

    def steps_per_print(self) -> int | None:
        """Optimizer steps from one line of progress to the next; None for no lines."""
        return self.parts.config.report.steps_per_print

    def wall_clock_breakdown(self) -> bool:
        """Whether each step prints its times."""
        return self.parts.config.report.wall_clock_breakdown

    @property
    def dp_world_size(self) -> int:
        """Ranks that share the data."""
        return self.parts.accumulation.world

    def zero_optimization_stage(self) -> int:
        """ZeRO stage of the config."""
        return self.parts.config.zero.stage

    def zero_optimization(self) -> bool:
        """Whether ranks share the optimizer state: stage 1 or more."""
        return self.parts.config.zero.stage >= 1

    def zero_optimization_partition_gradients(self) -> bool:
        """Whether ranks share gradients: stage 2 or more."""
        return self.parts.config.zero.stage >= 2

    def zero_optimization_partition_weights(self) -> bool:
        """Whether ranks share weights: stage 3."""
        return self.parts.config.zero.stage >= 3

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """True: whoever saves the model gets all of it, whatever the config says."""
        return True

    def bfloat16_enabled(self) -> bool:
        """Whether weights and activations are bf16."""
        return self.parts.config.precision.dtype == "bf16"

    def fp16_enabled(self) -> bool:
        """Whether weights and activations are fp16."""
        return self.parts.config.precision.dtype == "fp16"

    def loss_scale(self) -> float:
        """What the next loss will be multiplied by before backward; 1 without fp16."""
        return self.parts.scaler.scale

    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale follows overflows."""
        return self.parts.scaler.dynamic

    @property
    def config_params(self) -> dict[str, Any]:
        """A copy of `config`."""
        return dict(self.parts.given)

    @property
    def resolved_config(self) -> Config:
        """What the config and the keyword arguments come to, every setting with the value that counts."""
        return self.parts.config

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.parts.device

    def plan(self) -> Plan:
        """Units, homes and expected bytes."""
        return self.parts.plan

    def memory(self) -> dict[str, Any]:
        """Bytes per bucket as {"current", "peak"}, the process under "process", and the budget under "limit".

        The process's "peak" is the most that was resident since `initialize`, which resets the kernel's peak (so that
        `ru_maxrss` and `VmHWM` begin anew, too). Where the system does not allow that, a peak below that of before is
        known from samples only: at every step with a budget, and here; "exact" tells. "heap" is what the C allocator
        has taken for its heaps. Activations in host memory have the bucket "activations", which is not in "total".
        """
        usage: dict[str, Any] = {
            name: {"current": current, "peak": peak} for name, (current, peak) in self.parts.core().usage().items()
        }
        activations = self.parts.activations
        if activations is not None:
            usage["activations"] = {"current": activations.nbytes, "peak": activations.nbytes}
        usage["process"] = {**_core.resident(), "peak": self.parts.peak.most(), "exact": self.parts.peak.exact}
        usage["process"]["heap"] = _core.heap_bytes()
        usage["limit"] = self.parts.config.zeroxide.host_memory
        return usage

    def device_memory(self) -> dict[str, Any]:
        """Bytes of the engine's on the device that computes, per bucket as {"planned", "current", "peak"}, and
        `zeroxide.device_memory` under "limit"; empty where that is the host. Activations are torch's.
        """
        parts, planned = self.parts, self.parts.plan.numbers.device_buckets
        if planned is None or parts.transfers is None:
            return {}
        both = device_part(parts.core())
        held = both.state.nbytes() if both is not None and both.state is not None else dict.fromkeys(planned, 0)
        moved = {"current": parts.transfers.held, "peak": parts.transfers.most_held}
        found: dict[str, Any] = {}
        for name, bytes_planned in planned.items():
            beside = moved if name == "weights" else dict.fromkeys(moved, 0)
            found[name] = {"planned": bytes_planned, **{kind: held[name] + size for kind, size in beside.items()}}
        return {**found, "limit": parts.plan.device_limit}

    def device_traffic(self) -> dict[str, int]:
        """Bytes of weights copied `up` to the device since the start, of gradients copied `down`, and of activations
        copied down and up again (`activations_down`, `activations_up`); 0 where the model computes in host memory.

        Units whose optimizer state is at home on the device copy neither weights nor gradients.
        """
        copies = self.parts.transfers
        return {
            "up": 0 if copies is None else copies.bytes_up,
            "down": 0 if copies is None else copies.bytes_down,
            "activations_up": 0 if copies is None else copies.stowed_up,
            "activations_down": 0 if copies is None else copies.stowed_down,
        }

    def io(self) -> dict[str, Any]:
        """Disk traffic since the start, in bytes and seconds.

        `read_seconds` and `write_seconds` are times with at least one such operation in flight, `wait_seconds` those in
        which compute stood still for the disk, and `update_seconds` those spent on optimizer steps, waiting included,
        also where that was within the next forward.
        """
        found = self.parts.core().io()
        if found is None:
            counts = dict.fromkeys(("read_bytes", "write_bytes", "reads", "writes", "tiles_updated"), 0)
            seconds = dict.fromkeys(("read_seconds", "write_seconds", "wait_seconds", "update_seconds"), 0.0)
            return {**counts, **seconds, "engine": "none"}
        return found

    def exchanged_bytes(self) -> int:
        """Bytes of weights and gradients that this rank has sent to others since the start, whatever carried them."""
        return self.parts.weights.sent_bytes + self.parts.reduction.sent.total

    @property
    def monitor(self) -> Monitor:
        """What `write_events` of (tag, value, step) goes to, on rank 0; other ranks may call it as well."""
        return self.parts.observers.monitor

    @property
    def timers(self) -> Timers:
        """Timers by DeepSpeed's names; a script may add its own. With `wall_clock_breakdown` `step` prints and resets
        the engine's."""
        return self.parts.timers

    def get_wall_clock_timers(self) -> dict[str, float]:
        """Milliseconds by name at the last `step`, before it reset them; nothing without `wall_clock_breakdown`."""
        return dict(self.parts.timers.last)

    def times(self) -> dict[str, float]:
        """Seconds spent in forward, backward and step since the start."""
        return dict(self.parts.timers.seconds)

    # For scripts that free the device between steps ----------------------------------------------------------------

    def offload_states(
        self,
        include: Iterable[str] | None = None,
        device: str = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Sees that between steps nothing of `include` (DeepSpeed's words; None: everything) is on the device.

        State in host memory or on disk never is, so that nothing is moved and the last two have no effect. Raises
        ModelError, which names the setting that helps, for what is at home on the device, and without an optimizer;
        ConfigError for other words, and for NVMe.
        """
        self._stateful("offload_states").offload_states(include, device, pin_memory, non_blocking)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Ends `offload_states`: everything is at home. Raises ModelError without an optimizer."""
        self._stateful("reload_states").reload_states(non_blocking)

    def empty_partition_cache(self) -> None:
        """Gives memory that torch keeps for later back to the device. Memory for weights is the budget's and stays."""
        empty_cache(self.parts.device)

    def _stateful(self, asked: str) -> EngineOptimizer:
        optimizer: EngineOptimizer | None = self.parts.optimizer
        if optimizer is None:
            raise ModelError(f"{asked}: this engine only evaluates: it has no state to move")
        return optimizer

    # Settable, as scripts do --------------------------------------------------------------------------------------

    @property
    def optimizer(self) -> Any:
        """The optimizer, None for an engine that only evaluates."""
        return self.parts.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Any) -> None:
        self.parts.optimizer = optimizer

    @property
    def lr_scheduler(self) -> Any:
        """The schedule that `step` moves on, None for none: then whoever has one steps it."""
        return self.parts.lr_scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, scheduler: Any) -> None:
        self.parts.lr_scheduler = scheduler

    @property
    def global_steps(self) -> int:
        """Optimizer steps so far, those that were left out among them."""
        return self.parts.counters.global_steps

    @global_steps.setter
    def global_steps(self, steps: int) -> None:
        self.parts.counters.global_steps = steps

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were left out, since a gradient was not finite."""
        return self.parts.counters.skipped_steps

    @skipped_steps.setter
    def skipped_steps(self, steps: int) -> None:
        self.parts.counters.skipped_steps = steps

    @property
    def micro_steps(self) -> int:
        """Calls of `step` so far."""
        return self.parts.counters.micro_steps

    @micro_steps.setter
    def micro_steps(self, steps: int) -> None:
        self.parts.counters.micro_steps = steps

    # Micro-batches ------------------------------------------------------------------------------------------------

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self.parts.accumulation.steps

    def train_batch_size(self) -> int:
        """Samples per optimizer step over all ranks. Raises ConfigError where the config gives no batch size."""
        return self.parts.accumulation.train_batch

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per forward. Raises ConfigError where the config gives no batch size."""
        return self.parts.accumulation.micro_batch

    def get_batch_info(self) -> tuple[int, int, int]:
        """(samples per optimizer step, samples per forward, forwards per optimizer step).

        Raises ConfigError where the config gives no batch size.
        """
        return self.train_batch_size(), self.train_micro_batch_size_per_gpu(), self.gradient_accumulation_steps()

    @property
    def global_samples(self) -> int:
        """Samples of all optimizer steps so far, over all ranks. Raises ConfigError where the config gives no batch
        size."""
        self.train_micro_batch_size_per_gpu()
        return self.parts.counters.samples

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Changes the samples per optimizer step by changing the number of micro-batches; their size stays.

        Raises ConfigError for a number that is no multiple of the samples of one forward over all ranks, and in the
        middle of a window, whose gradients are divided by the number of before.
        """
        self.parts.accumulation.set_train_batch(train_batch_size)

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Changes the samples per forward; the number of forwards per optimizer step stays. Raises ConfigError.

        The engine's own data loader goes on with the size that it was made with.
        """
        self.parts.accumulation.set_micro_batch(micro_batch_size)

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next `step` updates the weights; with `managed_gradient_accumulation` false, whether a `step` is
        under way, since each is a boundary and nothing else is."""
        return self.parts.accumulation.is_boundary()

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Decides from outside whether `step` updates the weights; None goes back to what the config says.

        That is counting, or with `managed_gradient_accumulation` false an update at every `step`.
        """
        self.parts.accumulation.boundary = is_boundary

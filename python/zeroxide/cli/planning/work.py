"""From what is asked to every option worked out: plans by the planner, a rehearsed pass, and what was measured."""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zeroxide import _core
from zeroxide.cli.planning.estimate import FRAGMENTS, Estimate, Work, estimate
from zeroxide.cli.planning.measured import Disk, Machine, Planned
from zeroxide.cli.planning.passes import PassSeconds, meta_model, pass_seconds, rehearse_training
from zeroxide.cli.planning.request import Option, Request
from zeroxide.cli.planning.search import options
from zeroxide.cli.training.models import ModelChoice
from zeroxide.config import Config, load
from zeroxide.device.placement import HOST, ON_PAPER
from zeroxide.distributed import Ranks
from zeroxide.engine.rows import cut_by_config
from zeroxide.errors import ConfigError, StorageError
from zeroxide.optim.groups import groups_for, state_plans
from zeroxide.plan.plan import Plan, make_plan
from zeroxide.precision.policy import torch_dtype
from zeroxide.profiling.rehearsal import Rehearsal

__all__ = ["Workbench", "base_config", "formats_of", "threads_of"]

_DEFAULTS: dict[str, Any] = {"bf16": {"enabled": True}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}
_OWN = ("format", "host_memory", "device_memory", "state_in_memory")
"""Keys of `zeroxide` that an option or the command decides."""
_CHOSEN = ("offload_param", "offload_optimizer", "cpu_offload", "cpu_offload_param")
"""Keys of `zero_optimization` that an option decides."""


def base_config(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config without what an option decides, and what of that it had: `format` and `host_memory`."""
    config = copy.deepcopy(given) if given else copy.deepcopy(_DEFAULTS)
    config.setdefault("optimizer", _DEFAULTS["optimizer"])
    zero = config.get("zero_optimization")
    if isinstance(zero, dict):
        for key in _CHOSEN:
            zero.pop(key, None)
    own = config.get("zeroxide")
    decided = {}
    if isinstance(own, dict):
        decided = {key: own.pop(key) for key in _OWN if key in own}
    return config, decided


def formats_of(config: dict[str, Any], ranks: int) -> list[str]:
    """The formats that go with the config's dtype, as the core lists them."""
    found = []
    for name in _core.formats():
        try:
            load(_with_format(config, name), world_size=ranks)
        except ConfigError as error:
            if error.path == "zeroxide.format":
                continue
            raise
        found.append(name)
    return found


def _with_format(config: dict[str, Any], format: str, in_memory: int = 0) -> dict[str, Any]:
    kept = {"state_in_memory": in_memory} if in_memory else {}
    return {**config, "zeroxide": {**config.get("zeroxide", {}), "format": format, **kept}}


def _kept_in_memory(request: Request, each: Estimate) -> int:
    """Bytes of an option's state on disk that the budget of host memory leaves room for, in whole MiB.

    None without a budget: then all of the state may be in host memory, which is an option of its own.
    """
    if request.host_memory is None or not each.fits or each.option.offload not in ("mixed", "nvme"):
        return 0
    rest = request.host_memory - each.process
    # What comes on top has its part of fragments, too.
    return rest * FRAGMENTS // (FRAGMENTS + 1) >> 20 << 20


def _short(request: Request, each: Estimate) -> int:
    """Bytes of host memory that an option lacks; where it lacks something else, all that it has there."""
    if set(each.over) != {"host"} or request.host_memory is None:
        return each.process
    return each.over["host"] - request.host_memory


def threads_of(config: dict[str, Any]) -> int:
    """Threads of a process: the config's, else one for each processor that it may use."""
    return int(config.get("zeroxide", {}).get("threads") or len(os.sched_getaffinity(0)))


@dataclass
class Workbench:
    """Works requests about one model out, and keeps what was rehearsed."""

    choice: ModelChoice
    formats: list[str]
    machine: Machine
    disk: Disk | None
    threads: int
    prepare: Callable[[list[Rehearsal]], None]
    """Told of rehearsals before their operations' times are asked for."""

    def __post_init__(self) -> None:
        self._rehearsals: dict[tuple[int, int, bool, bool], Rehearsal] = {}
        self._plans: dict[tuple[str, str], Plan] = {}

    def __call__(self, request: Request, *, timed: bool = True) -> list[Estimate]:
        """All options, worked out. Raises ModelError, ConfigError or StorageError.

        timed: what is not known yet of operations' times is measured; otherwise it follows from their sizes.
        """
        config = load(_with_format(request.config, self.formats[0]), world_size=request.ranks)
        dtype = torch_dtype(config.precision.dtype)
        again = _checkpoints(self.choice)
        rehearsals = {
            each: self.rehearsal(request, dtype, checkpointing=each) for each in ((False, True) if again else (False,))
        }
        free = _free(request.disk)
        if timed:
            self.prepare(list(rehearsals.values()))
        found = []
        for option in options(request, self.formats, checkpointing=again):
            rehearsal = rehearsals[option.checkpointing]
            seconds = pass_seconds(self.machine, rehearsal)
            work = Work(rehearsal.peak, seconds, (rehearsal.forward.flops, rehearsal.backward.flops))

            def worked_out(option: Option, dtype: torch.dtype = dtype, work: Work = work) -> Estimate:
                plan = self.plan(request, option, dtype, work.activations)
                return estimate(request, option, plan, work, self.machine, self.disk, free)

            found.append(worked_out(option))
            stowed = self._with_activations_on_disk(request, found[-1], seconds, dtype, free)
            found += [stowed] if stowed is not None else []
            kept = _kept_in_memory(request, found[-1])
            while kept > 0:
                each = worked_out(replace(option, in_memory=kept))
                if each.fits:
                    found.append(each)
                    break
                # Gradients of units whose state stays do not leave memory either.
                kept = (kept - _short(request, each)) >> 20 << 20
        return found

    def _with_activations_on_disk(
        self, request: Request, each: Estimate, seconds: PassSeconds, dtype: torch.dtype, free: int | None
    ) -> Estimate | None:
        """An option that lacks host memory alone, with its activations on disk; None where that does not help."""
        if set(each.over) != {"host"} or request.disk is None or request.device is not None:
            return None
        if each.process - each.activations - each.activations // FRAGMENTS > (request.host_memory or 0):
            # It would not fit without any activation.
            return None
        option = replace(each.option, stowed=True)
        found = self.rehearsal(request, dtype, checkpointing=option.checkpointing, stowed=True)
        work = Work(found.peak, seconds, (found.forward.flops, found.backward.flops), found.stowed)
        plan = self.plan(request, option, dtype, found.peak)
        other = estimate(request, option, plan, work, self.machine, self.disk, free)
        return other if other.fits else None

    def planned(self, request: Request, estimates: list[Estimate]) -> dict[str, Planned]:
        """What runs are to be compared with, by `Planned.key`; nothing of a device that need not be here."""
        if request.device is not None:
            return {}
        config = load(_with_format(request.config, self.formats[0]), world_size=request.ranks)
        found = {}
        for each in estimates:
            key = Planned.key(
                self.choice.digest(),
                dtype=config.precision.dtype,
                batch=request.batch,
                sequence=request.sequence,
                accumulate=config.batch.gradient_accumulation_steps,
                ranks=request.ranks,
                home=str(request.disk.resolve()) if request.disk is not None and each.disk_bytes else "",
                option=str(each.option),
            )
            found[key] = Planned(
                each.process,
                each.read // request.ranks,
                each.written // request.ranks,
                each.phases.forward + each.phases.update,
                each.phases.backward,
                time.time(),
            )
        return found

    def rehearsal(
        self, request: Request, dtype: torch.dtype, *, checkpointing: bool, stowed: bool = False
    ) -> Rehearsal:
        """A micro-batch of the request's size, rehearsed once."""
        key = (request.batch, request.sequence, checkpointing, stowed)
        if key not in self._rehearsals:
            self._rehearsals[key] = rehearse_training(
                self.choice, dtype, request.batch, request.sequence, checkpointing=checkpointing, stowed=stowed
            )
        return self._rehearsals[key]

    def plan(self, request: Request, option: Option, dtype: torch.dtype, activations: int) -> Plan:
        """The plan of rank 0, without a budget, so that it tells by how much one is too small."""
        # What is at home on a device depends on what activations leave.
        key = (f"{option.offload} {option.in_memory}", option.format)
        if request.device is not None:
            key = (str(option), str(activations))
        if key not in self._plans:
            self._plans[key] = _plan(self.choice, request, option, dtype, activations, self.threads)
        return self._plans[key]


def _checkpoints(choice: ModelChoice) -> bool:
    """Whether the model can compute its activations again."""
    import transformers

    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(choice.config), None)
    return bool(getattr(kind, "supports_gradient_checkpointing", False))


def _free(directory: Path | None) -> int | None:
    """Bytes free on the directory's disk. Raises StorageError where there is none."""
    if directory is None:
        return None
    try:
        return shutil.disk_usage(directory).free
    except OSError as error:
        raise StorageError(f"--disk {directory}: {error.strerror}", path=directory, errno=error.errno) from None


def _plan(
    choice: ModelChoice, request: Request, option: Option, dtype: torch.dtype, activations: int, threads: int
) -> Plan:
    module = meta_model(choice, dtype)
    home = f"nvme:{request.disk}"
    param, state = {"none": ("none", "none"), "cpu": ("cpu", "cpu"), "mixed": ("cpu", home), "nvme": (home, home)}[
        option.offload
    ]
    config = load(
        _with_format(request.config, option.format, option.in_memory),
        world_size=request.ranks,
        offload_param=param,
        offload_optimizer=state,
    )
    device, asked = _device(request, option, config, activations)
    ranks = Ranks(
        world=request.ranks,
        local_world=request.ranks,
        backend="fake",
        same_host=True,
        shares_memory=request.ranks > 1 and request.device is None,
    )
    cut_by_config(module, config)
    groups = groups_for(module, config, None, None)
    states = state_plans(groups, config)
    return make_plan(
        module, config, threads=threads, resident=0, ranks=ranks, states=states, device=device, asked=asked
    )


def _device(
    request: Request, option: Option, config: Config, activations: int
) -> tuple[torch.device, _core.DeviceRequest | None]:
    """The device that computes and what it is to have, as `plan/on_device.py` asks for it of one that is there."""
    if request.device is None:
        return HOST, None
    stay = config.zero.stage < 3 or (request.ranks == 1 and not config.zero.offload_param.enabled)
    room = max(0, request.device.memory - activations) if option.offload == "none" and request.ranks == 1 else 0
    return ON_PAPER, _core.DeviceRequest(weights_stay=stay, room=room)

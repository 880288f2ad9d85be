"""From what is asked to every option worked out: plans by the planner, a rehearsed pass, and what was measured."""

from __future__ import annotations

import copy
import functools
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
from zeroxide.cli.planning.passes import meta_model, pass_seconds, rehearse_training
from zeroxide.cli.planning.request import Option, Request
from zeroxide.cli.planning.search import fastest, fewest_blocks, options
from zeroxide.cli.training.models import ModelChoice
from zeroxide.config import Config, load
from zeroxide.device.placement import HOST, ON_PAPER
from zeroxide.distributed import Ranks
from zeroxide.engine.heap import LARGE_BLOCK, PASSING_BLOCK
from zeroxide.engine.rows import cut_by_config
from zeroxide.errors import ConfigError, StorageError
from zeroxide.optim.groups import groups_for, state_plans
from zeroxide.plan.plan import Plan, make_plan
from zeroxide.plan.recompute import blocks_to_recompute
from zeroxide.plan.update_in_backward import early_problem
from zeroxide.precision.policy import torch_dtype
from zeroxide.profiling.rehearsal import Rehearsal

__all__ = ["Workbench", "base_config", "formats_of", "threads_of"]

_DEFAULTS: dict[str, Any] = {"bf16": {"enabled": True}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}
_OWN = ("format", "host_memory", "device_memory", "state_in_memory", "recompute", "update_in_backward")
"""Keys of `zeroxide` that an option or the command decides."""
_CHOSEN = ("offload_param", "offload_optimizer", "cpu_offload", "cpu_offload_param")
"""Keys of `zero_optimization` that an option decides."""


def base_config(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config without what an option decides, and what of that it had: `format`, `host_memory` and others."""
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


def _with_format(config: dict[str, Any], format: str, **more: Any) -> dict[str, Any]:
    """The config with that format, and with what else of `zeroxide` has a value."""
    given = {key: value for key, value in more.items() if value}
    return {**config, "zeroxide": {**config.get("zeroxide", {}), "format": format, **given}}


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
        self._rehearsals: dict[tuple[int, int, bool, int], Rehearsal] = {}
        self._blocks: int | None = None
        self._plans: dict[tuple[str, str], Plan] = {}

    def __call__(self, request: Request, *, timed: bool = True, in_part: bool = True) -> list[Estimate]:
        """All options, worked out. Raises ModelError, ConfigError or StorageError.

        timed: what is not known yet of operations' times is measured; otherwise it follows from their sizes. in_part:
        options that recompute some blocks are among them, which fit only where one that recomputes all does.
        """
        dtype = self._dtype(request)
        blocks = self.blocks(dtype)
        rehearsals = [self.rehearsal(request, dtype, recompute=each) for each in ((0, blocks) if blocks else (0,))]
        free = _free(request.disk)
        if timed:
            self.prepare(rehearsals)
        found = []
        early = functools.partial(self.early, request)
        for option in options(request, self.formats, blocks=blocks, early=early):
            each = self._worked_out(request, option, dtype, free)
            found.append(each)
            stowed = self._with_activations_on_disk(request, each, dtype, free)
            others = (
                stowed,
                self._with_some_on_disk(request, stowed, dtype, free) if in_part else None,
                self._with_blocks_recomputed(request, each, dtype, free) if in_part else None,
                self._with_state_in_memory(request, each, dtype, free),
            )
            found += [other for other in others if other is not None]
        return found

    def early(self, request: Request, offload: str) -> tuple[bool, ...]:
        """Whether backward updates where weights and state are there: what is asked for, or both where it can."""
        if request.early is False:
            return (False,)
        config = _loaded(request, Option(offload, self.formats[0]))
        device = HOST if request.device is None else ON_PAPER
        # Blocks of rows that modules share are complete only when backward ends.
        can = config.zeroxide.row_bytes is None and early_problem(config, _ranks(request), device) is None
        return ((True,) if request.early else (False, True)) if can else (False,)

    def _worked_out(self, request: Request, option: Option, dtype: torch.dtype, free: int | None) -> Estimate:
        rehearsal = self.rehearsal(request, dtype, stowed=option.stowed, recompute=option.recompute)
        # What is on disk meanwhile takes the same operations.
        plain = self.rehearsal(request, dtype, recompute=option.recompute)
        flops = (rehearsal.forward.flops, rehearsal.backward.flops)
        seconds = pass_seconds(self.machine, plain, _fresh_from(option))
        work = Work(rehearsal.peak, seconds, flops, rehearsal.stowed)
        plan = self.plan(request, option, dtype, work.activations)
        return estimate(request, option, plan, work, self.machine, self.disk, free)

    def _with_state_in_memory(
        self, request: Request, each: Estimate, dtype: torch.dtype, free: int | None
    ) -> Estimate | None:
        """An option that fits, with as much of its state on disk in memory instead as there is room for."""
        kept = _kept_in_memory(request, each)
        while kept > 0:
            other = self._worked_out(request, replace(each.option, in_memory=kept), dtype, free)
            if other.fits:
                return other
            # Gradients of units whose state stays do not leave memory either.
            kept = (kept - _short(request, other)) >> 20 << 20
        return None

    def _with_blocks_recomputed(
        self, request: Request, each: Estimate, dtype: torch.dtype, free: int | None
    ) -> Estimate | None:
        """An option whose activations alone have no room, with as few blocks recomputed as that takes; None where all
        would have to be, which is an option of its own."""
        if each.option.recompute or set(each.over) != {"host" if request.device is None else "device"}:
            return None
        found = self._fewest_recomputed(request, each.option, dtype, free)
        return found if found.fits and found.option.recompute < self.blocks(dtype) else None

    def _fewest_recomputed(self, request: Request, option: Option, dtype: torch.dtype, free: int | None) -> Estimate:
        """An option that does not fit, with as few blocks recomputed as that takes, or with all."""
        count = self.blocks(dtype)
        known: dict[int, Estimate] = {}

        def lacks(recompute: int) -> int:
            known[recompute] = each = self._worked_out(request, replace(option, recompute=recompute), dtype, free)
            if request.device is not None:
                return each.device - request.device.memory
            return each.process - (request.host_memory or 0)

        if lacks(count) > 0 or count < 2:
            return known[count]
        return known[fewest_blocks(count, lacks)]

    def fewest_recomputed(self, request: Request, option: Option) -> Estimate:
        """The option, and where it does not fit with as few blocks recomputed as that takes: with all, where that does
        not fit either. Raises as a call does."""
        dtype = self._dtype(request)
        free = _free(request.disk)
        found = self._worked_out(request, option, dtype, free)
        return found if found.fits else self._fewest_recomputed(request, option, dtype, free)

    def _dtype(self, request: Request) -> torch.dtype:
        config = load(_with_format(request.config, self.formats[0]), world_size=request.ranks)
        return torch_dtype(config.precision.dtype)

    def _with_activations_on_disk(
        self, request: Request, each: Estimate, dtype: torch.dtype, free: int | None
    ) -> Estimate | None:
        """An option that lacks host memory alone, with its activations on disk; None where that does not help."""
        if set(each.over) != {"host"} or request.disk is None or request.device is not None:
            return None
        if each.process - each.activations - each.activations // FRAGMENTS > (request.host_memory or 0):
            # It would not fit without any activation.
            return None
        other = self._worked_out(request, replace(each.option, stowed=True), dtype, free)
        return other if other.fits else None

    def _with_some_on_disk(
        self, request: Request, stowed: Estimate | None, dtype: torch.dtype, free: int | None
    ) -> Estimate | None:
        """An option whose passes wait for activations on disk, with as many of the first blocks recomputed instead as
        makes it fastest; None where that is none of them or all."""
        count = self.blocks(dtype)
        if stowed is None or stowed.option.recompute or stowed.phases.waiting == 0.0 or count < 2:
            return None
        known = {0: stowed}

        def seconds(recompute: int) -> float:
            if recompute not in known:
                option = replace(stowed.option, recompute=recompute)
                known[recompute] = self._worked_out(request, option, dtype, free)
            return known[recompute].phases.total

        found = fastest(count, seconds)
        return known[found] if 0 < found < count and known[found].fits else None

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

    def rehearsal(self, request: Request, dtype: torch.dtype, *, stowed: bool = False, recompute: int = 0) -> Rehearsal:
        """A micro-batch of the request's size, rehearsed once."""
        key = (request.batch, request.sequence, stowed, recompute)
        if key not in self._rehearsals:
            self._rehearsals[key] = rehearse_training(
                self.choice,
                dtype,
                request.batch,
                request.sequence,
                checkpointing=False,
                stowed=stowed,
                recompute=recompute,
            )
        return self._rehearsals[key]

    def blocks(self, dtype: torch.dtype) -> int:
        """How many blocks of the model can be recomputed."""
        if self._blocks is None:
            self._blocks = len(blocks_to_recompute(meta_model(self.choice, dtype)))
        return self._blocks

    def plan(self, request: Request, option: Option, dtype: torch.dtype, activations: int) -> Plan:
        """The plan of rank 0, without a budget, so that it tells by how much one is too small."""
        # What is at home on a device depends on what activations leave.
        key = (f"{option.offload} {option.in_memory} {option.early}", option.format)
        if request.device is not None:
            key = (str(option), str(activations))
        if key not in self._plans:
            self._plans[key] = _plan(self.choice, request, option, dtype, activations, self.threads)
        return self._plans[key]


def _fresh_from(option: Option) -> int | None:
    """Bytes from which blocks are given back to the system and asked for anew, as `engine/heap.py` sets it."""
    if option.recompute or option.stowed:
        return PASSING_BLOCK
    return LARGE_BLOCK if option.offload in ("mixed", "nvme") else None


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
    config = _loaded(request, option)
    device, asked = _device(request, option, config, activations)
    cut_by_config(module, config)
    groups = groups_for(module, config, None, None)
    states = state_plans(groups, config)
    return make_plan(
        module, config, threads=threads, resident=0, ranks=_ranks(request), states=states, device=device, asked=asked
    )


def _loaded(request: Request, option: Option) -> Config:
    """The config of a run of the option. Raises ConfigError."""
    home = f"nvme:{request.disk}"
    param, state = {"none": ("none", "none"), "cpu": ("cpu", "cpu"), "mixed": ("cpu", home), "nvme": (home, home)}[
        option.offload
    ]
    more = {"state_in_memory": option.in_memory, "update_in_backward": option.early}
    return load(
        _with_format(request.config, option.format, **more),
        world_size=request.ranks,
        offload_param=param,
        offload_optimizer=state,
    )


def _ranks(request: Request) -> Ranks:
    return Ranks(
        world=request.ranks,
        local_world=request.ranks,
        backend="fake",
        same_host=True,
        shares_memory=request.ranks > 1 and request.device is None,
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

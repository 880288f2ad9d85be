"""What one way of training comes to: bytes by bucket, on disk and over the disk, seconds by phase, and whether it fits.

The plan counts payload and traffic exactly. The process is that, its activations as a rehearsal has found them and what
every process takes, with the plan's allowance for fragments. Seconds follow from measured rates; where several ranks
share the host's processors, each has its part of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from zeroxide.cli.planning.measured import Disk, Machine
from zeroxide.cli.planning.passes import PassSeconds
from zeroxide.cli.planning.request import Option, Request
from zeroxide.config.sections.activations import BUFFERS
from zeroxide.config.state_formats import EXACT
from zeroxide.plan.home import Home
from zeroxide.plan.plan import Plan

__all__ = ["FRAGMENTS", "Estimate", "Phases", "Work", "estimate"]

FRAGMENTS = 40
"""One part in so many of a process is left for what its allocator cannot use again, as the planner has it."""


@dataclass(frozen=True)
class Work:
    """What a micro-batch takes, as a rehearsal found it."""

    activations: int
    """Most bytes beside weights and kept gradients."""
    seconds: PassSeconds
    """On one process that has all of the host's processors."""
    flops: tuple[int, int]
    """Of forward and backward."""
    stowed: int = 0
    """Bytes that are on disk between forward and backward."""


@dataclass(frozen=True)
class Phases:
    """Seconds of a step. With state on disk the update runs within the next forward, and is `update` all the same."""

    forward: float
    backward: float
    update: float
    waiting: float
    """Of these, what compute stands still for the disk and for copies."""

    @property
    def total(self) -> float:
        """Of the step."""
        return self.forward + self.backward + self.update


@dataclass(frozen=True)
class Estimate:
    """One option, worked out. Bytes are of each process, disk and wear of the whole host."""

    option: Option
    exact: bool
    """The format keeps every bit of fp32 weights and moments."""
    buckets: dict[str, int]
    activations: int
    process: int
    """Most resident bytes."""
    device: int
    """Bytes on a device, activations included; 0 where the host computes."""
    disk_bytes: int
    read: int
    """Bytes a step."""
    written: int
    phases: Phases
    problems: tuple[str, ...] = ()
    """Why it does not fit, in short: empty where it does."""
    over: dict[str, int] = field(default_factory=dict)
    """Bytes that are needed, by the budget that is too small for them: "host", "disk" or "device"."""

    @property
    def fits(self) -> bool:
        """Whether it keeps all budgets."""
        return not self.problems

    def wear(self, drive: int | None) -> dict[str, float]:
        """Bytes written by 1,000 steps, and the share of a drive's life of so many bytes."""
        written = 1000 * self.written
        return {"bytes": written} if drive is None else {"bytes": written, "share": written / drive}

    def as_json(self, drive: int | None) -> dict[str, Any]:
        """All of it as JSON has it."""
        found = asdict(self)
        found["option"] |= {"name": str(self.option)}
        found["phases"]["total"] = self.phases.total
        return found | {"fits": self.fits, "wear_of_1000_steps": self.wear(drive)}


def estimate(
    request: Request,
    option: Option,
    plan: Plan,
    work: Work,
    machine: Machine,
    disk: Disk | None,
    free: int | None,
) -> Estimate:
    """Works one option out. `plan` is that of its homes and format, `free` what the disk has in bytes."""
    buckets = plan.buckets
    on_host = request.device is None
    activations = work.activations + (BUFFERS if option.stowed else 0)
    beside = machine.process_bytes + (activations if on_host else 0) + plan.resident_before
    steady = beside + sum(buckets.values())
    made = machine.process_bytes + plan.resident_before + plan.expected_peaks()["total"]
    # Where blocks are recomputed, the allocator gives what is freed back to the system (`engine/heap.py`).
    process = max(steady if option.recompute else steady + steady // FRAGMENTS, made, machine.start_bytes)
    device = 0 if plan.numbers.device_buckets is None else sum(plan.numbers.device_buckets.values()) + activations
    passing = work.stowed * int(request.config.get("gradient_accumulation_steps", 1))
    again = plan.traffic_of_redone() if plan.early.speculates else (0, 0)
    once = zip(plan.expected_traffic(), again, strict=True)
    read, written = (each + passing + round(request.clipped * redone) for each, redone in once)
    need = {
        "host": (process, request.host_memory),
        "disk": ((plan.disk_bytes + work.stowed) * request.ranks, _least(request.disk_bytes, free)),
        "device": (device, None if request.device is None else request.device.memory),
    }
    over = {name: bytes for name, (bytes, limit) in need.items() if limit is not None and bytes > limit}
    return Estimate(
        option=option,
        exact=all(format in EXACT for format in plan.formats),
        buckets=dict(buckets),
        activations=activations,
        process=process,
        device=device,
        disk_bytes=need["disk"][0],
        read=read * request.ranks,
        written=written * request.ranks,
        phases=_phases(request, option, plan, work, machine, disk),
        problems=tuple(f"{name} over by {_mib(bytes - (need[name][1] or 0))}" for name, bytes in over.items()),
        over=over,
    )


def _mib(count: int) -> str:
    return f"{-(-count // (1 << 20)):,} MiB"


def _least(*limits: int | None) -> int | None:
    return min((each for each in limits if each is not None), default=None)


def _phases(request: Request, option: Option, plan: Plan, work: Work, machine: Machine, disk: Disk | None) -> Phases:
    """What a step takes. Copies and reads that run beside compute count as far as they take longer."""
    micro = int(request.config.get("gradient_accumulation_steps", 1))
    kept = sum(unit.trainable for unit in plan.units) // (plan.groups.shard.size if plan.stage > 0 else 1)
    # Ranks of one host share its processors; each updates its part of the state.
    share = request.ranks
    forward, backward, copies = _compute(request, plan, work)
    if request.device is None:
        forward, backward = work.seconds.forward * share, work.seconds.backward * share
        copies = (0.0, 0.0)
    # A gradient is read and written where it is kept, and read once more where it is added to.
    gathered = plan.numbers.sent_bytes() / machine.bytes_per_second if machine.bytes_per_second else 0.0
    backward += (
        2 * kept * plan.grad.itemsize / machine.bytes_per_second if machine.bytes_per_second else 0.0
    ) + gathered
    hosted = kept - sum(plan.units[index].trainable for index in plan.units_on_device)
    compute = hosted * machine.update_seconds[option.format] * share
    read, written = plan.expected_traffic()
    # What an update reads: state, weights, and gradients that wait on disk for it.
    kept_there = plan.numbers.disk_bytes - plan.numbers.spilled_bytes
    left = min(read, kept_there + (0 if plan.early.speculates else plan.numbers.speculation_traffic[0]))
    update = waiting = 0.0
    reads = 0.0
    if disk is not None and plan.state is Home.DISK:
        moved = (left + written) * request.ranks
        # The step goes on under the forward that follows, or began under backward: its waits for the disk are hidden
        # there, and on a device its arithmetic, too, which elsewhere shares the processor with the pass.
        total = max(compute, moved / disk.update)
        compute += moved * disk.work
        beside = 0.0 if request.device is not None else compute
        # Before the next forward ends all of it must be there.
        update = max(beside, total - forward - (backward if plan.early.updates else 0.0))
        redone = sum(plan.traffic_of_redone()) * request.ranks / disk.update
        clips = request.clipped if plan.early.speculates else 0.0
        update += clips * max(beside, redone - forward)
        waiting = max(0.0, update - (1 + clips) * compute)
        reads = (read - left) * request.ranks / disk.read
        if request.device is None:
            # The processor's part of those reads; what backward writes is counted in the update.
            backward += (read - left) * request.ranks * disk.work
    else:
        update = compute
    writes = 0.0
    if disk is not None and work.stowed:
        writes = work.stowed * request.ranks / disk.write
        reads += work.stowed * request.ranks / disk.read
    late = (max(0.0, max(copies[0], writes) - forward), max(0.0, max(copies[1], reads) - backward))
    return Phases(
        forward=micro * (forward + late[0]),
        backward=micro * (backward + late[1]),
        update=update,
        waiting=waiting + micro * sum(late),
    )


def _compute(request: Request, plan: Plan, work: Work) -> tuple[float, float, tuple[float, float]]:
    """Seconds of forward and backward on a device, and of the copies beside them; zeros where the host computes."""
    device = request.device
    if device is None:
        return 0.0, 0.0, (0.0, 0.0)
    away = plan.units_on_device
    moving = [unit for index, unit in enumerate(plan.units) if index not in away]
    up = sum(unit.words for unit in moving) * plan.compute.itemsize / device.link
    down = sum(unit.trainable for unit in moving) * plan.grad.itemsize / device.link
    # Weights that leave the device go up for forward and for backward; others once, when they are new.
    return work.flops[0] / device.flops, work.flops[1] / device.flops, (up, (up if plan.transient else 0.0) + down)

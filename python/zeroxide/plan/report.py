"""The plan in words, and what was reserved and used beside what it expected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from zeroxide.plan.home import Home

if TYPE_CHECKING:
    from zeroxide.plan.discover import UnitPlan
    from zeroxide.plan.plan import Plan

__all__ = ["describe"]

MIB = 1 << 20


def describe(plan: Plan) -> list[str]:
    """The plan in lines for people."""
    total = sum(unit.numel for unit in plan.units)
    trainable = sum(unit.trainable for unit in plan.units)
    share = 100.0 * trainable / total if total else 0.0
    shared = plan.world > 1 and plan.transport == "shared" and not plan.replicated
    shards = plan.groups.shard.size
    grouped = plan.stage > 0 and shards < plan.world
    sharers = f"the {shards} ranks of a group" if grouped else "all ranks"
    home = {
        Home.HOST: "in host memory" + (f", one copy for {sharers}" if shared else ""),
        Home.SHARD: "in host memory, a shard on each rank",
        Home.DISK: "on disk",
    }[plan.weights]
    place = "host memory" if plan.state is Home.HOST else "files"
    if plan.state is Home.DISK and plan.buckets["optimizer"]:
        in_memory = plan.buckets["optimizer"]
        on_disk = sum(unit.state.bytes(unit.trainable) for unit, home in _state_homes(plan) if home == "disk")
        place += f", {100.0 * in_memory / (in_memory + on_disk):.0f} % of it in host memory"
    beside = "beside it" if plan.units_on_device else "in host memory"
    if plan.units_on_device:
        rest = sum(unit.trainable for index, unit in enumerate(plan.units) if index not in plan.units_on_device)
        part = f"{100.0 * (trainable - rest) / trainable:.0f} % on {plan.device}"
        place = f"{part}, the rest in {place}" if rest else f"device memory, all of it on {plan.device}"
    if plan.gradients is Home.DISK:
        beside = "on disk until the step"
    elif plan.gradients is Home.CONSUMED:
        beside = "in host memory until backward updates their unit"
    lines = [
        f"{total / 1e6:.1f} M parameters ({share:.0f} % trainable) in {len(plan.units)} units; "
        f"{_dtype(plan.compute)} weights at home {home}",
        f"optimizer state in {place}, format {', '.join(plan.formats)}; "
        f"gradients {_dtype(plan.grad)} {beside}; {plan.threads} optimizer threads",
    ]
    if plan.world > 1:
        carrier = "shared memory" if plan.transport == "shared" else "collectives"
        over = f" over groups of {shards} ranks, replicated across {plan.groups.replicate.size}" if grouped else ""
        lines.append(f"rank {plan.rank} of {plan.world}, ZeRO stage {plan.stage}{over}, gradients through {carrier}")
        lines += _as_integers(plan)
    buckets = ", ".join(f"{name} {size / MIB:.0f}" for name, size in plan.buckets.items() if size)
    lines.append(f"payload {plan.payload / MIB:.0f} MiB ({buckets}); on disk {plan.disk_bytes / MIB:.0f} MiB")
    lines += _speculation(plan) + _recomputed(plan) + _activations(plan) + _on_device(plan)
    filling = plan.expected_peaks()["staging"] - plan.buckets["staging"]
    if filling:
        lines.append(f"while the engine is made, staging has {filling / MIB:.0f} MiB more for initial values")
    if plan.limit is not None:
        rest = plan.limit - plan.resident_before - plan.payload
        lines.append(
            f"budget {plan.limit / MIB:.0f} MiB: {plan.resident_before / MIB:.0f} in use before, "
            f"{rest / MIB:.0f} left for activations"
            + (f" of {plan.in_flight} micro-batches at once" if plan.in_flight > 1 else "")
        )
    elif plan.in_flight > 1:
        lines.append(f"activations of up to {plan.in_flight} micro-batches at once")
    return lines


def _state_homes(plan: Plan) -> Iterator[tuple[UnitPlan, str]]:
    """Every unit with the home of its optimizer state."""
    return zip(plan.units, plan.numbers.states, strict=True)


def _on_device(plan: Plan) -> list[str]:
    """What the device has, in one line, or none where the model computes in host memory."""
    buckets = plan.numbers.device_buckets
    if buckets is None:
        return []
    each = ", ".join(f"{name} {size / MIB:.0f}" for name, size in buckets.items() if size)
    limit = "" if plan.device_limit is None else f" of {plan.device_limit / MIB:.0f}"
    return [f"on {plan.device} {sum(buckets.values()) / MIB:.0f}{limit} MiB ({each}), beside activations"]


def _recomputed(plan: Plan) -> list[str]:
    """Which blocks compute their activations again, in one line, or none where no block does."""
    names = plan.recompute.names
    if not names:
        return []
    which = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    return [f"activations of {len(names)} of {plan.recompute.blocks} blocks computed again in backward: {which}"]


def _speculation(plan: Plan) -> list[str]:
    """What updates take on disk that may be taken back, beside waiting for the norm, or none where none are."""
    if plan.early.problem is not None:
        return [f'updates wait for the step, though update_in_backward is "adaptive": {plan.early.problem}']
    if not plan.early.speculates:
        return []
    least, waiting = sum(plan.expected_traffic()), sum(plan.numbers.disk_traffic())
    when = ", while few of the last steps did," if plan.early.chooses else ""
    return [
        f"backward updates before it is known whether the step clips{when or ':'} {least / MIB:.0f} MiB a step on disk "
        f"where it does not, {sum(plan.traffic_of_redone()) / MIB:.0f} more where it does; {waiting / MIB:.0f} where "
        "updates wait"
    ]


def _activations(plan: Plan) -> list[str]:
    """Where activations wait, in one line, or none where they stay where they are."""
    asked = plan.activations
    if asked.path is None:
        return []
    part = "activations" if asked.home == "disk" else "activations that host_memory has no room for"
    size = "as much as a pass needs" if asked.disk is None else f"{asked.disk / MIB:.0f} MiB reserved"
    return [f"{part} on disk in {asked.path}, {size}, through {asked.buffers / MIB:.0f} MiB of buffers"]


def _as_integers(plan: Plan) -> list[str]:
    """What travels as integers, in one line, or none where nothing does."""
    quantisation = plan.quantisation
    found = []
    if any(quantisation.weights):
        kept = sum(size for _, size in plan.numbers.codes)
        what = (
            "weights"
            if all(quantisation.weights)
            else f"weights of {sum(quantisation.weights)} of {len(plan.units)} units"
        )
        group = f" for a group of {quantisation.secondary} ranks" if quantisation.secondary else ""
        found.append(f"{what} as int8, {kept / MIB:.0f} MiB of codes kept{group}")
    if quantisation.gradients:
        kept = sum(size for _, size in plan.numbers.residuals)
        feedback = f" with error feedback of {kept / MIB:.0f} MiB" if quantisation.feedback else ""
        found.append(f"gradients as int4{feedback}")
    return ["between ranks " + "; ".join(found)] if found else []


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

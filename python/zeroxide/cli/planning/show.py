"""A plan's options in words and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from zeroxide.cli.planning.estimate import Estimate
from zeroxide.cli.planning.request import Request
from zeroxide.config.sizes import format_bytes

__all__ = ["as_json", "details", "how_to_run", "refusal", "table"]


def table(request: Request, estimates: Sequence[Estimate], best: Estimate | None) -> Iterator[str]:
    """The options side by side, one a line; the recommended one has a star."""
    device = [f"{'device':>9s} "] if request.device is not None else []
    yield (
        f"  {'option':<42s} {'memory':>9s} {''.join(device)}{'payload':>9s} {'activ.':>9s} {'on disk':>9s} "
        f"{'disk/step':>9s} {'forward':>8s} {'backward':>8s} {'update':>8s} {'waiting':>8s}  fits"
    )
    for each in estimates:
        phases = each.phases
        seconds = " ".join(
            f"{value:6.2f} s" for value in (phases.forward, phases.backward, phases.update, phases.waiting)
        )
        sizes = [each.process, *([each.device] if request.device is not None else [])]
        sizes += [sum(each.buckets.values()), each.activations, each.disk_bytes, each.read + each.written]
        columns = " ".join(f"{_short(size):>9s}" for size in sizes)
        mark, fits = "*" if each is best else " ", ", ".join(each.problems) or "yes"
        yield f"{mark} {each.option!s:<42s} {columns} {seconds}  {fits}"


def details(request: Request, best: Estimate) -> Iterator[str]:
    """What the recommended option comes to."""
    buckets = ", ".join(f"{name} {format_bytes(size)}" for name, size in best.buckets.items() if size)
    yield f"recommended: {best.option}, {best.phases.total:.2f} s a step"
    yield f"  payload: {buckets or 'none in host memory'}"
    if best.read or best.written:
        yield f"  disk: a step reads {format_bytes(best.read)} and writes {format_bytes(best.written)}"
        wear = best.wear(request.drive_bytes)
        share = f", {100 * wear['share']:.2g} % of what the drive may be written" if "share" in wear else ""
        yield f"  wear: 1,000 steps write {format_bytes(int(wear['bytes']))}{share}"
    yield f"  to run it: {how_to_run(request, best)}"


def how_to_run(request: Request, best: Estimate) -> str:
    """The command, or for what the command has no words for the arguments of `initialize`."""
    option = best.option
    again = f" --recompute {option.recompute}" if option.recompute else ""
    again += " --update-in-backward always" if option.early else ""
    away = f" --activation-path {request.disk}" if option.stowed else ""
    if option.offload == "mixed" or option.in_memory:
        homes = f'offload="nvme:{request.disk}"'
        if option.offload == "mixed":
            homes = f'offload_param="cpu", offload_optimizer="nvme:{request.disk}"'
        kept = f', "state_in_memory": {option.in_memory}' if option.in_memory else ""
        kept += f', "activations": "disk", "activation_path": "{request.disk}"' if option.stowed else ""
        kept += f', "recompute": {option.recompute}' if option.recompute else ""
        kept += ', "update_in_backward": true' if option.early else ""
        own = f'{{"format": "{option.format}"{kept}}}'
        return f'zeroxide.initialize(..., {homes}, config={{"zeroxide": {own}, ...}})'
    home = f"nvme:{request.disk}" if option.offload == "nvme" else option.offload
    limit = f" --host-memory {request.host_memory}" if request.host_memory is not None else ""
    start = (
        "zeroxide train" if request.ranks == 1 else f"torchrun --nproc-per-node {request.ranks} -m zeroxide.cli train"
    )
    return (
        f"{start} --model {request.model} --offload {home} --format {option.format} "
        f"--batch-size {request.batch} --seq-len {request.sequence}{limit}{again}{away}"
    )


def refusal(
    request: Request,
    least: Estimate | None,
    smaller: tuple[Estimate, int, int] | None,
    larger: Estimate | None,
) -> Iterator[str]:
    """Why nothing fits, and what is nearest, the last line first in importance."""
    budgets = {"--host-memory": request.host_memory, "--disk-bytes": request.disk_bytes}
    given = ", ".join(f"{name} {format_bytes(size)}" for name, size in budgets.items() if size is not None)
    device = "" if request.device is None else f", a device of {format_bytes(request.device.memory)}"
    yield f"nothing fits {given or 'what is free on the disk'}{device} with micro-batches of {_size(request)}"
    if larger is not None:
        yield f"with --disk DIR it would: {larger.option} takes {format_bytes(larger.process)}"
    if smaller is not None:
        estimate, batch, sequence = smaller
        yield f"with --batch {batch} --sequence {sequence} it would: {estimate.option}"
    if least is not None:
        yield f"with --host-memory {-(-least.process // (1 << 20))}MiB it would: {least.option}"


def _size(request: Request) -> str:
    return f"{request.batch} x {request.sequence} tokens"


def _short(count: int) -> str:
    """In three digits and a unit."""
    value, unit = float(count), "B"
    for each in ("K", "M", "G", "T", "P"):
        if abs(value) < 1000:
            break
        value, unit = value / 1024, f"{each}iB"
    return "-" if not count else f"{value:.3g} {unit}"


def as_json(
    request: Request,
    estimates: Sequence[Estimate],
    best: Estimate | None,
    least: Estimate | None,
    smaller: tuple[Estimate, int, int] | None,
    larger: Estimate | None,
    taken: Sequence[str],
) -> dict[str, Any]:
    """All of it as JSON has it: bytes and seconds."""
    near: dict[str, Any] = {}
    if least is not None:
        near["host_memory"] = {"bytes": least.process, "option": str(least.option)}
    if smaller is not None:
        near["batch"] = {"batch": smaller[1], "sequence": smaller[2], "option": str(smaller[0].option)}
    if larger is not None:
        near["disk"] = {"option": str(larger.option), "process": larger.process}
    return {
        "model": request.model,
        "batch": request.batch,
        "sequence": request.sequence,
        "ranks": request.ranks,
        "host_memory": request.host_memory,
        "measured": list(taken),
        "options": [each.as_json(request.drive_bytes) for each in estimates],
        "recommended": None if best is None else str(best.option),
        "run": None if best is None else how_to_run(request, best),
        "nearest": near,
    }

"""What was planned for a run beside what it reached, and what it wrote to the disk."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

from zeroxide.cli.planning.measured import Measurements, Planned, cache_file, machine_key
from zeroxide.cli.training.options import TrainOptions
from zeroxide.cli.training.run_folder import Record
from zeroxide.cli.training.running import Running
from zeroxide.config.sizes import format_bytes

__all__ = ["STEPS_UNTIL_STEADY", "planned_for", "say_planned", "say_wear"]

STEPS_UNTIL_STEADY = 2
"""The first step finds no moments on disk, and ends within the second."""


def planned_for(
    options: TrainOptions, record: Record, *, ranks_here: int, recomputed: int = 0, early: bool = False
) -> Planned | None:
    """What `zeroxide plan` expected of this run on this machine, if it was asked. Ranks are all on one host then.

    recomputed: blocks that compute their activations again. early: whether backward updates.
    """
    path = cache_file()
    if ranks_here != record.ranks or not path.is_file():
        return None
    kind, _, directory = options.offload.partition(":")
    if options.activation_checkpointing:
        # The model's own: no plan is of that.
        return None
    again = ", early" if early else ""
    again += f", recompute {recomputed}" if recomputed else ""
    away = ", activations on disk" if options.activation_path is not None else ""
    key = Planned.key(
        record.model_digest,
        dtype=options.dtype,
        batch=options.batch_size,
        sequence=options.seq_len,
        accumulate=options.accumulate,
        ranks=record.ranks,
        home=str(Path(directory).expanduser().resolve()) if kind == "nvme" else "",
        option=f"{'cpu' if kind == 'none' else kind}, {options.format}{again}{away}",
    )
    threads = min(options.threads * ranks_here, len(os.sched_getaffinity(0)))
    return Measurements.load(path, machine_key(threads)).plans.get(key)


def say_planned(this: Running) -> None:
    """Reports what was planned and what was reached: the process's peak, and the median of the steps after
    the second."""
    planned, steady = this.planned, this.phases[STEPS_UNTIL_STEADY:]
    if planned is None:
        return
    peak = int(this.engine.memory()["process"]["peak"])
    parts = [f"{format_bytes(planned.process)} of memory, reached {format_bytes(peak)} ({_off(peak, planned.process)})"]
    took: dict[str, float] = {}
    if steady:
        took = {
            name: statistics.median(each[at] for each in steady)
            for at, name in enumerate(("forward_and_update", "backward"))
        }
        for name, seconds in took.items():
            want = getattr(planned, name)
            parts.append(f"{name.replace('_', ' ')} {want:.3f} s, took {seconds:.3f} s ({_off(seconds, want)})")
    for number, line in enumerate(parts):
        this.reporter.say(f"  {'planned' if number == 0 else '':<9} {line}")
    this.reporter.event(
        "planned",
        step=this.step,
        expected={
            "process": planned.process,
            "forward_and_update": planned.forward_and_update,
            "backward": planned.backward,
            "read": planned.read,
            "written": planned.written,
        },
        took={"process": peak, **took},
    )


def _off(got: float, expected: float) -> str:
    """How far it is from what was expected, in per cent of that."""
    return f"{100 * (got / expected - 1):+.0f} %" if expected else "not expected"


def say_wear(this: Running) -> None:
    """Reports what the run has written to the disk, as the queue counted it; nothing where it wrote nothing."""
    total = int(this.engine.io()["write_bytes"])
    if not total:
        return
    steps = len(this.traffic)
    written = sorted(each for _, each in this.traffic[STEPS_UNTIL_STEADY:] or this.traffic)
    of_step = written[len(written) // 2] if written else 0
    this.reporter.say(
        f"  wear      {format_bytes(total)} written in {steps} steps, {format_bytes(1000 * of_step)} in 1,000 of them"
    )
    this.reporter.event("wear", step=this.step, total=total, of_step=of_step)

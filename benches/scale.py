"""Train a model whose state is many times the memory it gets, and print what that took: one JSON line a size.

    python benches/scale.py --layers 6 --layers 18          0.4 B and 1 B at width 2048
    python benches/scale.py --billions 7 --width 4096       as many layers as make 7 B

Every size is a process of its own that builds the model on the meta device, draws its weights into the store on disk,
and makes three AdamW steps. Peak resident memory is looked at from outside: /proc/PID/status while the process runs,
and the kernel's account of it when it has ended. Where a memory control group can be made, the process lives in one
with the cap as its limit, and would be killed beyond it. Disk bytes are the kernel's count for the process.

`zeroxide` must be installed for the interpreter that runs this, and transformers with it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import side_by_side as bench

CGROUPS = Path("/sys/fs/cgroup")
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Shape:
    """A Llama-like model: every layer has 4 hidden^2 + 3 hidden x feed_forward + 2 hidden parameters."""

    hidden: int
    feed_forward: int
    layers: int
    vocabulary: int

    @classmethod
    def of_width(cls, hidden: int, layers: int, vocabulary: int) -> Shape:
        """The feed-forward width of Llama: 8/3 of the hidden one, in multiples of 256."""
        return cls(hidden, -(-8 * hidden // 3) // 256 * 256 + 256, layers, vocabulary)

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.feed_forward + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole: embedding and head are two tensors."""
        return self.layers * self.layer + 2 * self.vocabulary * self.hidden + self.hidden


@contextmanager
def memory_group(cap: int) -> Iterator[Path | None]:
    """A memory control group with a limit of `cap` bytes; None where none can be made."""
    if (CGROUPS / "cgroup.subtree_control").exists():
        parent, limit = CGROUPS, "memory.max"
    else:
        parent, limit = CGROUPS / "memory", "memory.limit_in_bytes"
    group = parent / f"zeroxide-scale-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(cap))
    except OSError:
        if group.exists():
            group.rmdir()
        yield None
        return
    try:
        yield group
    finally:
        # The last process leaves the group a moment after it has been waited for.
        for _ in range(100):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.05)


def peak_of(pid: int) -> int:
    """Most resident bytes of a process as far as the kernel remembers; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return max((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), default=0)


def run(spec: dict[str, Any], group: Path | None, timeout: float) -> tuple[dict[str, Any] | None, int, str]:
    """(result of the worker or None, peak resident bytes seen from outside, what else is to be said)."""

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    side = bench.zeroxide_side()
    command = [str(side.python), str(bench.WORKERS / "scale_step.py"), json.dumps(spec)]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            env=side.variables({}, spec["threads"]),
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=enter,
        )
        peak, deadline = 0, time.monotonic() + timeout
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, peak_of(process.pid))
            if time.monotonic() > deadline:
                process.send_signal(signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        process.returncode = os.waitstatus_to_exitcode(status)
        peak = max(peak, usage.ru_maxrss * 1024)
        output.seek(0)
        lines = output.read().splitlines()
    found = [line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")]
    if found:
        return json.loads(found[-1]), peak, ""
    return None, peak, f"status {process.returncode}: " + " | ".join(lines[-4:])


def figures(shape: Shape, spec: dict[str, Any], result: dict[str, Any], peak: int, cap: int, held: str) -> dict:
    """One row of the table."""
    # The first step reads no moments: what every later one moves is what counts.
    steady = result["steps"][1:] or result["steps"]
    moved = statistics.median(step["read_bytes"] + step["write_bytes"] for step in steady)
    return {
        "benchmark": "scale",
        "parameters": result["parameters"],
        "hidden": shape.hidden,
        "layers": shape.layers,
        "vocabulary": shape.vocabulary,
        "tokens": spec["rows"] * spec["columns"] * spec["accumulate"],
        "clip": spec["clip"],
        "update_in_backward": spec["update_in_backward"],
        "peak_rss_bytes": peak,
        "setup_peak_bytes": result["setup_peak"],
        "cap_bytes": cap,
        "cap_held_by": held,
        "under_the_cap": peak <= cap,
        "disk_bytes": result["disk_bytes"],
        "setup_seconds": round(result["setup_seconds"], 1),
        "step_seconds": [round(step["seconds"], 1) for step in result["steps"]],
        "step_bytes_per_parameter": round(moved / result["parameters"], 2),
        "losses": result["losses"],
        "payload": result["memory"].get("payload"),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = bench.arguments(__doc__ or "")
    bench.scratch_argument(parser)
    parser.add_argument("--layers", type=int, action="append", default=[], help="a size, in layers; may be repeated")
    parser.add_argument("--billions", type=float, action="append", default=[], help="a size, in 10^9 parameters")
    parser.add_argument("--width", type=int, default=2048, help="hidden width (default %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="rows of the embedding (default %(default)s)")
    parser.add_argument("--cap", type=float, default=4.0, help="GiB of resident memory (default %(default)s)")
    parser.add_argument("--budget", default=None, help="host_memory given to zeroxide, as 4GiB (default: the cap)")
    parser.add_argument("--no-budget", action="store_true", help="give zeroxide no host_memory")
    parser.add_argument("--rows", type=int, default=1, help="sequences in a micro-batch (default %(default)s)")
    parser.add_argument("--columns", type=int, default=128, help="tokens in a sequence (default %(default)s)")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in a step (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (default %(default)s)")
    parser.add_argument("--clip", type=float, default=1.0, help="largest global norm; 0 for none (default %(default)s)")
    parser.add_argument("--update-in-backward", action="store_true", help="at once; taken back where a step clips")
    parser.add_argument("--format", default=None, help="state format (default: zeroxide's)")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in backward")
    parser.add_argument("--loss-chunk", type=int, default=0, help="vocabulary columns with logits at a time; 0: all")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds for one size (default %(default)s)")
    return parser.parse_args()


def sizes(options: argparse.Namespace) -> list[Shape]:
    """The shapes asked for; one of 7 B where none was."""
    one = Shape.of_width(options.width, 1, options.vocabulary)
    rest = one.parameters - one.layer
    layers = list(options.layers)
    billions = options.billions or ([] if layers else [7.0])
    layers += [max(1, round((each * 1e9 - rest) / one.layer)) for each in billions]
    return [Shape.of_width(options.width, each, options.vocabulary) for each in layers]


def main() -> None:
    options = parse()
    cap = int(options.cap * (1 << 30))
    budget = None if options.no_budget else options.budget or str(cap)
    failed = False
    for shape in sizes(options):
        directory = options.directory / f"scale-{os.getpid()}"
        directory.mkdir(parents=True, exist_ok=True)
        spec = {
            "hidden": shape.hidden,
            "feed_forward": shape.feed_forward,
            "layers": shape.layers,
            "vocabulary": shape.vocabulary,
            "rows": options.rows,
            "columns": options.columns,
            "steps": options.steps,
            "accumulate": options.accumulate,
            "directory": str(directory),
            "host_memory": budget,
            "clip": options.clip,
            "update_in_backward": options.update_in_backward,
            "format": options.format,
            "checkpointing": options.checkpointing,
            "loss_chunk": options.loss_chunk,
            "threads": options.threads,
        }
        try:
            with memory_group(cap) as group:
                held = "nothing" if group is None else "cgroup"
                result, peak, problem = run(spec, group, options.timeout)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        if result is None:
            failed = True
            print(json.dumps({"benchmark": "scale", "parameters": shape.parameters, "failed": problem, "peak": peak}))
        else:
            print(json.dumps(figures(shape, spec, result, peak, cap, held)))
        sys.stdout.flush()
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()

"""The update of optimizer state on disk beside fio, which moves as many bytes in the same mix of reads and writes.

    python benches/update_share.py --rounds 5

An update reads a tile, computes, and writes it back, so the disk reads and writes at the same time. fio does so without
computing: blocks of a tile's size, as many in flight as the ring has room for, past the page cache, from huge pages,
into a file whose blocks have been written before. They take turns; what counts is the update's bytes a second over
fio's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import side_by_side as bench

BLOCK = 2 << 20
"""A tile of an fp32 moment."""
DEPTH = 16
"""As many fit into the ring of 32 MiB."""
WARM = 2


def fio(path: Path, size: int, reads: int, prefix: list[str]) -> float:
    """Bytes a second of reads and writes together, of which `reads` in a hundred are reads."""
    command = [*prefix, "fio", "--name=bench", f"--filename={path}", "--rw=rw", f"--rwmixread={reads}", "--direct=1"]
    command += [f"--bs={BLOCK}", f"--iodepth={DEPTH}", f"--size={size}", "--thread", "--ioengine=io_uring"]
    command += ["--output-format=json", "--randrepeat=0", "--overwrite=1"]
    done = subprocess.run(command, env=os.environ | bench.HUGE_PAGES, capture_output=True, text=True, check=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    moved = job["read"]["io_bytes"] + job["write"]["io_bytes"]
    return float(moved) / (max(job["read"]["runtime"], job["write"]["runtime"]) / 1e3)


def update(options: Any) -> list[dict[str, float]]:
    """The steps of one process."""
    directory = options.directory / "update-share"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    spec = {
        "width": 2048,
        "layers": options.layers,
        "steps": WARM + 4,
        "format": options.format,
        "directory": str(directory),
        "threads": options.threads,
    }
    try:
        result = bench.run_worker(
            bench.zeroxide_side(), "update_alone.py", spec, threads=options.threads, prefix=options.prefix
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    steps: list[dict[str, float]] = result["steps"][WARM:]
    return steps


def main() -> None:
    parser = bench.arguments(__doc__ or "")
    bench.scratch_argument(parser)
    parser.add_argument("--layers", type=int, default=24, help="of 4.2 million parameters each (default %(default)s)")
    parser.add_argument("--format", default="split", help="of the state (default %(default)s)")
    options = parser.parse_args()

    bench.emit("machine", bench.machine(options.directory))
    options.directory.mkdir(parents=True, exist_ok=True)
    path = options.directory / "update-share.fio"
    ours: list[float] = []
    theirs: list[float] = []
    shares: list[float] = []
    try:
        for number in range(options.rounds):
            bench.note(f"round {number + 1} of {options.rounds}")
            steps = update(options)
            moved = sum(step["read_bytes"] + step["write_bytes"] for step in steps)
            rate = moved / sum(step["seconds"] for step in steps)
            reads = round(100 * sum(step["read_bytes"] for step in steps) / moved)
            size = int(moved / len(steps)) // BLOCK * BLOCK
            if not path.exists():
                # Writes every block once: the first write to one costs more.
                fio(path, size, 0, options.prefix)
            floor = fio(path, size, reads, options.prefix)
            ours.append(rate / 1e9)
            theirs.append(floor / 1e9)
            shares.append(rate / floor)
    finally:
        path.unlink(missing_ok=True)
    share = bench.summary(shares, 3)
    figures = {
        "format": options.format,
        "reads_percent": reads,
        "step_bytes": size,
        "update_gb_per_second": bench.summary(ours, 3),
        "fio_gb_per_second": bench.summary(theirs, 3),
        "share": share,
    }
    bench.emit("update_share", figures)
    goal = bench.goal("update of state on disk, share of fio", share["median"], 0.92, at_most=False)
    bench.emit("update_share", goal)


if __name__ == "__main__":
    main()

"""The disk queue beside fio and DeepSpeed's asynchronous I/O handle: reads and writes of one large file.

    python benches/disk_queue.py --directory /mnt/nvme/scratch --bytes 4294967296 --rounds 10

All move the same number of bytes in 1 MiB blocks past the page cache (O_DIRECT), into files whose blocks have been
written before, from and to huge pages. In a round each writes and then reads once. fio is what the disk can do: the
bound is to be level with it, not to beat it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import side_by_side as bench

Samples = dict[str, dict[str, list[float]]]


def fio_pass(options: argparse.Namespace, path: Path, direction: str, engine: str) -> float:
    """GB/s of one fio job over the whole of `path`."""
    command = [*options.prefix, "fio", "--name=bench", f"--filename={path}", f"--rw={direction}", "--direct=1"]
    command += [f"--bs={options.block}", f"--iodepth={options.depth}", f"--size={options.bytes}", "--thread"]
    command += [f"--ioengine={engine}", "--output-format=json", "--randrepeat=0", "--overwrite=1"]
    done = subprocess.run(command, env=os.environ | bench.HUGE_PAGES, capture_output=True, text=True, check=True)
    # Warnings may stand before the object.
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][direction]
    return float(job["io_bytes"]) / (float(job["runtime"]) / 1e3) / 1e9


def queue_passes(options: argparse.Namespace, binary: str, engine: str) -> dict[str, Any]:
    """GB/s of our queue: writes the file, then measures one write and one read of it."""
    command = [*options.prefix, binary, "--directory", str(options.directory), "--engine", engine]
    command += ["--bytes", str(options.bytes), "--block", str(options.block), "--depth", str(options.depth)]
    done = subprocess.run([*command, "--repeat", "2"], capture_output=True, text=True, check=True)
    found: dict[str, Any] = {}
    for line in map(json.loads, done.stdout.splitlines()):
        if line["op"] == "checksum":
            found["checksum"] = line["gb_per_s"]
        elif line["round"] == 1:
            found[line["op"]] = line["gb_per_s"]
            found["about"] = {key: line[key] for key in ("engine", "direct")}
    return found


def run_round(
    options: argparse.Namespace, binary: str, aio: dict[str, bench.Contestant], samples: Samples, about: dict[str, Any]
) -> None:
    """Every contestant once, into `samples`: contestant -> direction -> GB/s."""
    for engine in ("io_uring", "libaio") if shutil.which("fio") else ():
        for direction in ("write", "read"):
            speed = fio_pass(options, options.directory / "fio.bin", direction, engine)
            samples.setdefault(f"fio {engine}", {}).setdefault(direction, []).append(speed)
    for engine in ("io_uring", "threads"):
        name = f"zeroxide {engine}"
        found = queue_passes(options, binary, engine)
        for direction in ("write", "read"):
            samples.setdefault(name, {}).setdefault(direction, []).append(found[direction])
        about[name] = found["about"] | {"checksum_gb_per_s": round(found["checksum"], 1)}
    for name, contestant in aio.items():
        answer = contestant.round()
        for direction in ("write", "read"):
            speed = options.bytes / answer[f"{direction}_seconds"] / 1e9
            samples.setdefault(name, {}).setdefault(direction, []).append(speed)


def main() -> None:
    parser = bench.arguments(__doc__ or "")
    bench.scratch_argument(parser)
    parser.add_argument("--bytes", type=int, default=1 << 30, help="size of each file (default %(default)s)")
    parser.add_argument("--block", type=int, default=1 << 20, help="bytes of one operation (default %(default)s)")
    parser.add_argument("--depth", type=int, default=32, help="operations in flight (default %(default)s)")
    parser.set_defaults(rounds=5)
    options = parser.parse_args()

    options.directory = options.directory / "disk-queue"
    shutil.rmtree(options.directory, ignore_errors=True)
    options.directory.mkdir(parents=True)
    bench.emit("machine", bench.machine(options.directory))
    if not shutil.which("fio"):
        bench.note("fio is not installed: without it (apt-get install fio)")
    binary = str(bench.cargo_example("zeroxide-storage", "queue_bench"))
    aio: dict[str, bench.Contestant] = {}
    samples: Samples = {}
    about: dict[str, Any] = {}
    try:
        for parallelism in (1, options.threads):
            aio[f"deepspeed aio, {parallelism} thread(s)"] = bench.Contestant(
                bench.peers_side(),
                "deepspeed_aio.py",
                {
                    "path": str(options.directory / f"deepspeed-{parallelism}.bin"),
                    "bytes": options.bytes,
                    "block": options.block,
                    "depth": options.depth,
                    "parallelism": parallelism,
                },
                threads=options.threads,
                environment=bench.HUGE_PAGES,
                prefix=options.prefix,
            )
        if shutil.which("fio"):
            bench.note("writing fio's file")
            fio_pass(options, options.directory / "fio.bin", "write", "io_uring")
        for number in range(options.rounds):
            bench.note(f"round {number + 1} of {options.rounds}")
            run_round(options, binary, aio, samples, about)
    finally:
        for contestant in aio.values():
            contestant.close()
        shutil.rmtree(options.directory, ignore_errors=True)

    medians: dict[tuple[str, str], float] = {}
    for name, directions in samples.items():
        for direction, speeds in directions.items():
            result = bench.summary(speeds, 3)
            medians[name, direction] = result["median"]
            bench.emit(
                "disk_queue",
                {
                    "contestant": name,
                    "direction": direction,
                    "bytes": options.bytes,
                    "block": options.block,
                    "depth": options.depth,
                    "gb_per_second": result,
                    **about.get(name, {}),
                },
            )
    for ours in (name for name in samples if name.startswith("zeroxide")):
        for other in (name for name in samples if not name.startswith("zeroxide")):
            shares = {way: round(medians[ours, way] / medians[other, way], 3) for way in ("write", "read")}
            bench.emit("disk_queue", {"ours": ours, "of": other, **shares})


if __name__ == "__main__":
    main()

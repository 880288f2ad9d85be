"""`zeroxide bench`: how fast training is on this machine, beside torch, at each home of the state."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zeroxide.cli.paths import written_path
from zeroxide.cli.training.options import DTYPES
from zeroxide.config.sizes import format_bytes
from zeroxide.errors import ConfigError, StorageError, ZeroxideError

if TYPE_CHECKING:
    from zeroxide.cli.measuring.process import Task

__all__ = ["bench"]

_ADAM_BYTES = 28
"""Read and written by one AdamW step in fp32, a parameter: weight and two moments twice, the gradient once."""


def bench(
    directory: Annotated[
        str | None,
        typer.Argument(
            help="Directory on the disk to be measured, and for offloaded state. Default: none is measured.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[int, typer.Option(min=1, max=1024, help="Layers of the model that is trained.")] = 8,
    width: Annotated[int, typer.Option(min=64, max=65536, help="Its width, a multiple of 64.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Sequences per step.")] = 1,
    seq_len: Annotated[int, typer.Option(min=2, max=65536, help="Tokens per sequence.")] = 128,
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Steps of each run that count.")] = 8,
    parameters: Annotated[
        int, typer.Option(min=1_000_000, help="Parameters of the optimizer step alone, in fp32; 16 bytes each.")
    ] = 50_000_000,
    dtype: Annotated[str, typer.Option(help="What forward computes in: bf16, fp16 or fp32.")] = "bf16",
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Times that each runs, in turn.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Measure the optimizer step, whole training steps at each home of the state, and the disk; torch runs beside.

    \b
    Each contestant is a process of its own, and they take turns. Takes about a minute; nothing is left behind.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}", path="dtype", got=dtype)
    if width % 64:
        raise ConfigError(f"--width {width}: expected a multiple of 64", path="width", got=str(width))
    folder = _folder(directory)
    from zeroxide.cli.measuring.process import Task

    common = Task(
        who="",
        what="train",
        layers=layers,
        width=width,
        rows=batch_size,
        columns=seq_len,
        steps=steps,
        dtype=dtype,
        parameters=parameters,
    )
    # First, so that a directory that cannot be written to is told at once.
    disk = None if folder is None else _disk(folder)
    contestants = dict(_contestants(common, folder))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for at in range(rounds):
        for name, task in contestants.items():
            if not as_json:
                print(f"round {at + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            found[name].append(_run(name, task))
    rows = [_row(name, runs) for name, runs in found.items()]
    if as_json:
        print(json.dumps({"rows": rows, "disk": disk}, indent=1))
    else:
        _show(rows, disk)
    return 0


def _folder(directory: str | None) -> str | None:
    """The directory, if there is one. Raises StorageError where it is none."""
    if directory is None:
        return None
    try:
        folder = written_path(directory)
    except OSError as error:
        raise StorageError(f"{directory}: {error.strerror or error}", path=directory, errno=error.errno) from None
    if not folder.is_dir():
        raise StorageError(f"{directory} is no directory: make it, or give another one", path=directory)
    return str(folder)


def _contestants(common: Task, folder: str | None) -> Iterator[tuple[str, Task]]:
    for who in ("torch", "zeroxide"):
        yield f"update, {who}", dataclasses.replace(common, who=who, what="update")
    yield "train, torch", dataclasses.replace(common, who="torch")
    homes = ["none", "cpu", *([] if folder is None else [f"nvme:{folder}"])]
    for home in homes:
        name = f"train, zeroxide, offload {home.partition(':')[0]}"
        yield name, dataclasses.replace(common, who="zeroxide", offload=home)


def _run(name: str, task: Task) -> dict[str, Any]:
    """What one process saw. Raises ZeroxideError for what it says, or that it ended without a word."""
    command = [sys.executable, "-m", "zeroxide.cli.measuring.process", json.dumps(dataclasses.asdict(task))]
    ended = subprocess.run(command, capture_output=True, text=True)
    lines = ended.stdout.splitlines()
    if ended.returncode != 0 or not lines:
        last = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
        raise ZeroxideError(f"{name}: {last}")
    found: dict[str, Any] = json.loads(lines[-1])
    if "error" in found:
        raise ZeroxideError(f"{name}: {found['error']}")
    return found


def _row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [each for run in runs for each in run["seconds"]]
    count = runs[0]["parameters"]
    return {
        "name": name,
        "parameters": count,
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "peak_bytes": round(statistics.median(run["peak"] for run in runs)),
        "disk_bytes_per_parameter": round(statistics.median(run["disk_bytes"] for run in runs) / count, 2),
        "loss": runs[0]["loss"],
    }


def _disk(folder: str) -> dict[str, Any]:
    from zeroxide import _core

    speed = _core.measure_disk(written_path(folder), 256 << 20, 1.0)
    return {
        "path": folder,
        "engine": speed.engine,
        "direct": speed.direct,
        "write_bytes_per_second": speed.write,
        "read_bytes_per_second": speed.read,
    }


def _show(rows: list[dict[str, Any]], disk: dict[str, Any] | None) -> None:
    print(f"{'':36s} {'median':>9s} {'fastest':>9s} {'slowest':>9s} {'peak memory':>12s}  of torch's")
    by_name = {each["name"]: each for each in rows}
    for each in rows:
        what = each["name"].partition(",")[0]
        beside = by_name[f"{what}, torch"]
        times = " ".join(f"{1e3 * each[key]:6.0f} ms" for key in ("seconds", "fastest", "slowest"))
        more = (
            f"{each['seconds'] / beside['seconds']:4.2f} time, {each['peak_bytes'] / beside['peak_bytes']:4.2f} memory"
        )
        if what == "update":
            more += f", {_ADAM_BYTES * each['parameters'] / each['seconds'] / 1e9:.1f} GB/s"
        if each["disk_bytes_per_parameter"]:
            more += f", {each['disk_bytes_per_parameter']:.1f} disk bytes a parameter"
        print(f"{each['name']:36s} {times} {format_bytes(each['peak_bytes']):>12s}  {more}")
    sizes = " and ".join(f"{each['parameters']:,}" for each in (rows[0], rows[-1]))
    print(f"parameters: {sizes}")
    if disk is not None:
        direct = "O_DIRECT" if disk["direct"] else "through the page cache"
        write, read = (disk[f"{which}_bytes_per_second"] / 1e9 for which in ("write", "read"))
        print(f"disk {disk['path']}: writes {write:.2f} GB/s, reads {read:.2f} GB/s, {disk['engine']}, {direct}")

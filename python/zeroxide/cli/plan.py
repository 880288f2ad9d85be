"""`zeroxide plan`: ways of training a model on a machine side by side, before anything of the model is there."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zeroxide.cli.paths import written_path
from zeroxide.config.sizes import parse_bytes
from zeroxide.errors import BudgetError, ConfigError, ModelError, StorageError

if TYPE_CHECKING:
    from zeroxide.cli.planning.axes import AskedAxes
    from zeroxide.cli.planning.measured import Planned
    from zeroxide.cli.planning.request import OnPaper, Request
    from zeroxide.cli.planning.work import Workbench

__all__ = ["plan"]

_BUDGETS, _DEVICE, _SIZE, _AXES = "Budgets", "A device on paper", "Size", "Ranks on paper"
_ON_ONE_HOST = 1024


def _size(text: str, panel: str | None = _BUDGETS) -> Any:
    """An option that takes a number of bytes, as people write it."""
    return typer.Option(help=text, show_default=False, rich_help_panel=panel)


Model = Annotated[
    str, typer.Argument(help="Preset, Hugging Face model directory, or its config.json.", show_default=False)
]
HostMemory = Annotated[str | None, _size("Budget of each process, as 4GiB. Default: no limit.")]
DiskPath = Annotated[str | None, _size("Directory for offloaded state. Default: nothing is offloaded to a disk.")]
DiskBytes = Annotated[str | None, _size("Most bytes there. Default: what is free.")]
DriveTbw = Annotated[str | None, _size("Bytes that the drive may be written in its life, as 600TB.")]
DeviceMemory = Annotated[str | None, _size("Memory of a device that need not be here, one for each process.", _DEVICE)]
DeviceRate = Annotated[
    float, typer.Option(min=1e-3, help="TFLOP/s that it reaches in training.", rich_help_panel=_DEVICE)
]
LinkRate = Annotated[
    float, typer.Option(min=1e-3, help="GB/s between it and host memory, each way.", rich_help_panel=_DEVICE)
]
RankCount = Annotated[
    int, typer.Option(min=1, max=1 << 20, help="Processes: on this host, or on paper.", rich_help_panel=_SIZE)
]
MeshAxes = Annotated[str | None, _size("Axes, as pp=4,tp=8,dp_replicate=2; what is left is dp_shard.", _AXES)]
MicroBatches = Annotated[
    int | None,
    typer.Option(
        min=1, help="Micro-batches of a step. Default: the config's.", show_default=False, rich_help_panel=_AXES
    ),
]
Stage = Annotated[
    int | None,
    typer.Option(min=0, max=3, help="ZeRO stage. Default: the config's.", show_default=False, rich_help_panel=_AXES),
]
ScheduleName = Annotated[str | None, _size("Schedule of a pipeline, as 1f1b or interleaved_1f1b:2.", _AXES)]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Activations are computed again in backward.", rich_help_panel=_AXES)
]
Batch = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Sequences in a micro-batch. Default: the config's, else 8.",
        show_default=False,
        rich_help_panel=_SIZE,
    ),
]
Sequence = Annotated[int, typer.Option(min=2, max=1 << 20, help="Tokens in each.", rich_help_panel=_SIZE)]
ClippedSteps = Annotated[
    float,
    typer.Option(min=0, max=1, help="Of the steps, how many gradient clipping changes.", rich_help_panel=_SIZE),
]
ConfigFile = Annotated[str | None, _size("The run's config, for all that a plan does not choose.", None)]
Renew = Annotated[bool, typer.Option("--renew", help="Measure this machine and disk again.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def plan(
    model: Model,
    host_memory: HostMemory = None,
    disk: DiskPath = None,
    disk_bytes: DiskBytes = None,
    drive_tbw: DriveTbw = None,
    device_memory: DeviceMemory = None,
    device_rate: DeviceRate = 100.0,
    link_rate: LinkRate = 20.0,
    ranks: RankCount = 1,
    batch: Batch = None,
    sequence: Sequence = 128,
    clipped_steps: ClippedSteps = 0.05,
    config: ConfigFile = None,
    mesh: MeshAxes = None,
    micro_batches: MicroBatches = None,
    stage: Stage = None,
    schedule: ScheduleName = None,
    checkpointing: Checkpointing = False,
    renew: Renew = False,
    as_json: Json = False,
) -> int:
    """Show ways of training a model side by side: memory, disk, time, wear. Nothing of the model is loaded.

    \b
    zeroxide plan gpt2-xl --host-memory 4GiB --disk /mnt/fast
    zeroxide plan llama-70b --ranks 1024 --mesh pp=4,tp=8 --micro-batches 32 --sequence 4096
    Exits with 2 where none fits, and says what is nearest. With --mesh, or a config with axes, it shows what each of
    any number of ranks would have and send.
    """
    from zeroxide.cli.planning.axes import AskedAxes, has_axes
    from zeroxide.config.source import read

    asked = AskedAxes(mesh, micro_batches, stage, schedule, checkpointing, batch)
    given = dict(read(config).data)
    if has_axes(asked, given):
        measured = {
            "--host-memory": host_memory, "--disk": disk, "--disk-bytes": disk_bytes, "--drive-tbw": drive_tbw,
            "--device-memory": device_memory,
        }  # fmt: skip
        return _on_paper(model, asked, given, ranks, sequence, measured, as_json=as_json)
    _check_one_host(asked, ranks)
    device = _device(device_memory, device_rate, link_rate)
    more: dict[str, Any] = {
        "host_memory": _bytes("--host-memory", host_memory),
        "disk_bytes": _bytes("--disk-bytes", disk_bytes),
        "drive_bytes": _bytes("--drive-tbw", drive_tbw),
    }
    folder = _folder(disk)
    if folder is None and (disk_bytes is not None or drive_tbw is not None):
        word = "--disk-bytes" if disk_bytes is not None else "--drive-tbw"
        raise ConfigError(f"{word} is for --disk: without a directory nothing is written", path=word)
    from zeroxide.cli.planning.measure import Measuring
    from zeroxide.cli.planning.request import Request
    from zeroxide.cli.planning.work import Workbench, base_config, formats_of, threads_of

    rest, decided = base_config(given)
    if more["host_memory"] is None and "host_memory" in decided:
        more["host_memory"] = parse_bytes(decided["host_memory"])
    micro = batch or rest.get("train_micro_batch_size_per_gpu") or 8
    early = decided.get("update_in_backward")
    more |= {"clipped": clipped_steps, "early": early if isinstance(early, bool) else None}
    request = Request(model, micro, sequence, disk=folder, device=device, ranks=ranks, config=rest, **more)
    formats = [decided["format"]] if "format" in decided else formats_of(rest, ranks)
    choice = _choice(model, sequence)
    threads = threads_of(rest)
    measuring = Measuring(threads, lambda line: print(line, file=sys.stderr, flush=True), renew=renew)
    machine = measuring.machine(formats)
    speed = None if folder is None else measuring.disk(folder)
    bench = Workbench(choice, formats, machine, speed, threads, functools.partial(measuring.operations, machine))
    return _answer(request, bench, measuring.taken, measuring.keep_plans, as_json=as_json)


def _on_paper(
    model: str,
    asked: AskedAxes,
    given: dict[str, Any],
    ranks: int,
    sequence: int,
    measured: Mapping[str, str | None],
    *,
    as_json: bool,
) -> int:
    """A job of any number of ranks."""
    from zeroxide.cli.planning.axes import as_lines, found_as_json, plan_axes

    for word, value in measured.items():
        if value is not None:
            raise ConfigError(f"{word} is for ranks on this host: leave it out where axes are on paper", path=word)
    found = plan_axes(_choice(model, sequence), asked, given, ranks, sequence)
    if as_json:
        print(json.dumps(found_as_json(model, found), indent=1))
    else:
        print(*as_lines(model, found), sep="\n")
    return 0


def _check_one_host(asked: AskedAxes, ranks: int) -> None:
    """Raises ConfigError for what only ranks on paper have."""
    for word, value in asked.words().items():
        if value:
            raise ConfigError(f"{word} is for ranks on paper: give --mesh, such as dp_shard={ranks}", path=word)
    if ranks > _ON_ONE_HOST:
        raise ConfigError(
            f"--ranks {ranks} on this host: at most {_ON_ONE_HOST}; on paper give --mesh, such as dp_shard={ranks}",
            path="--ranks",
            expected=f"at most {_ON_ONE_HOST}",
            got=str(ranks),
        )


def _answer(
    request: Request,
    bench: Workbench,
    taken: list[str],
    keep: Callable[[Mapping[str, Planned]], None],
    *,
    as_json: bool,
) -> int:
    """Prints what there is, and has it kept for the run. Raises BudgetError where nothing fits."""
    from zeroxide.cli.planning import show
    from zeroxide.cli.planning.search import largest_batch, nearest, recommended

    # Whether anything fits is known before anything is timed.
    estimates = bench(request, timed=False)
    if recommended(estimates) is not None:
        estimates = bench(request)
        keep(bench.planned(request, estimates))
    best = recommended(estimates)
    least = smaller = larger = None
    if best is None:
        whether = functools.partial(bench, timed=False, in_part=False)
        least, smaller = nearest(estimates), largest_batch(request, whether)
        if request.disk is None:
            larger = _with_disk(request, bench)
    if as_json:
        found = show.as_json(request, estimates, best, least, smaller, larger, taken)
        print(json.dumps(found, indent=1, ensure_ascii=False, default=str))
        return 0 if best is not None else 2
    for line in taken:
        print(line)
    print(*show.table(request, estimates, best), sep="\n")
    if best is not None:
        print(*show.details(request, best), sep="\n")
        return 0
    lines = list(show.refusal(request, least, smaller, larger))
    raise BudgetError("; ".join(lines), need=None if least is None else least.process, limit=request.host_memory)


def _with_disk(request: Request, bench: Workbench) -> Any:
    """What would fit if there were a disk, of unknown speed."""
    from zeroxide.cli.planning.search import recommended

    elsewhere = dataclasses.replace(request, disk=Path("/"), disk_bytes=None)
    return recommended(
        [
            dataclasses.replace(each)
            for each in bench(elsewhere, timed=False, in_part=False)
            if set(each.over) <= {"disk"}
        ]
    )


def _device(memory: str | None, rate: float, link: float) -> OnPaper | None:
    from zeroxide.cli.planning.request import OnPaper

    count = _bytes("--device-memory", memory)
    return None if count is None else OnPaper(count, rate * 1e12, link * 1e9)


def _bytes(word: str, text: str | None) -> int | None:
    """A size of the command line. Raises ConfigError."""
    if text is None:
        return None
    try:
        count = parse_bytes(int(text) if text.isdecimal() else text)
    except ValueError as error:
        raise ConfigError(f"{word}: expected {error}, got {text!r}", path=word, got=text) from None
    if not 1 << 20 <= count < 1 << 60:
        raise ConfigError(f"{word} {text} is not a usable size: give 1 MiB to 1 EiB", path=word, got=text)
    return count


def _folder(text: str | None) -> Path | None:
    """The directory of `--disk`. Raises StorageError."""
    if text is None:
        return None
    try:
        folder = written_path(text)
    except OSError as error:
        raise StorageError(f"--disk {text}: {error.strerror or error}", path=text, errno=error.errno) from None
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise StorageError(f"--disk {text} is no directory that can be written to", path=text)
    return folder


def _choice(model: str, sequence: int) -> Any:
    """The model, as `zeroxide train` finds it. Raises ModelError, ConfigError."""
    try:
        from zeroxide.cli.training.models import choose_model

        path = written_path(model)
        name = str(path.parent) if path.name == "config.json" and path.is_file() else model
        choice = choose_model(name)
    except ImportError:
        raise ModelError("zeroxide plan needs transformers: pip install transformers", name=model) from None
    except OSError as error:
        raise ModelError(f"{model}: {error.strerror}", name=model) from None
    if choice.longest_sequence is not None and sequence > choice.longest_sequence:
        raise ConfigError(
            f"--sequence {sequence} is longer than {choice.name} can take ({choice.longest_sequence})",
            path="--sequence",
        )
    return choice

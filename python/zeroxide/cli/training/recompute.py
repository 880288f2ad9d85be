"""How many blocks a run computes again in backward: what `--recompute` says, or as few as its budget takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from zeroxide.cli.planning.measure import Measuring
from zeroxide.cli.planning.passes import meta_model
from zeroxide.cli.planning.request import Option, Request
from zeroxide.cli.planning.work import Workbench, base_config
from zeroxide.cli.training.engine_setup import engine_config
from zeroxide.cli.training.models import ModelChoice
from zeroxide.cli.training.options import TrainOptions
from zeroxide.config.sizes import format_bytes, parse_bytes
from zeroxide.device.placement import compute_device, is_host
from zeroxide.distributed import Ranks
from zeroxide.errors import BudgetError, ConfigError, StorageError

__all__ = ["with_blocks_chosen"]


def with_blocks_chosen(
    options: TrainOptions, choice: ModelChoice, ranks: Ranks, say: Callable[[str], None]
) -> TrainOptions:
    """The options with a number in place of "auto": as few blocks as the budget of host memory takes, by a rehearsal.

    `options` are checked. Raises ConfigError where a plan does not know the memory, and BudgetError where the budget is
    too small with all blocks.
    """
    if options.recompute != "auto":
        return options
    if ranks.world != ranks.local_world:
        raise _refused("ranks on several hosts: a plan knows those of one")
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[options.dtype]
    device = compute_device("auto", meta_model(choice, dtype), ranks.local_rank)
    if not is_host(device):
        raise _refused(f"the model computes on {device}: a plan knows the memory of a host")
    assert options.host_memory is not None, "checked"
    assert options.format is not None, "checked"
    limit = parse_bytes(int(options.host_memory) if options.host_memory.isdecimal() else options.host_memory)
    home, _, directory = options.offload.partition(":")
    rest, _ = base_config(engine_config(dataclasses.replace(options, recompute="none"), "run"))
    asked = {"never": False, "always": True}.get(options.update_in_backward)
    request = Request(
        options.model,
        options.batch_size,
        options.seq_len,
        host_memory=limit,
        disk=_made(Path(directory).expanduser()) if directory else None,
        ranks=ranks.world,
        early=asked,
        config=rest,
    )
    measuring = Measuring(options.threads * ranks.local_world, say, renew=False)
    machine = measuring.machine([options.format])
    bench = Workbench(choice, [options.format], machine, None, options.threads, lambda _: None)
    where = "nvme" if home == "nvme" else "cpu"
    early = bench.early(request, where)[-1]
    found = bench.fewest_recomputed(request, Option(where, options.format, early=early))
    if not found.fits:
        blocks = found.option.recompute
        raise BudgetError(
            f"--recompute auto: {choice.name} with all {blocks} blocks recomputed takes {format_bytes(found.process)} "
            f"of host memory, more than --host-memory {options.host_memory}: give {-(-found.process // (1 << 20))}MiB, "
            "smaller micro-batches, or --offload nvme:DIR",
            need=found.process,
            limit=limit,
        )
    say(
        f"recompute: {found.option.recompute or 'none'} of {bench.blocks(dtype)} blocks, with which the process is "
        f"expected to take {format_bytes(found.process)} of {format_bytes(limit)}"
    )
    return dataclasses.replace(options, recompute=str(found.option.recompute) if found.option.recompute else "none")


def _made(directory: Path) -> Path:
    """The directory of the run's blocks, which is there from now on. Raises StorageError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"--offload nvme:{directory}: {error.strerror}", path=directory, errno=error.errno) from None
    return directory


def _refused(problem: str) -> ConfigError:
    return ConfigError(f"--recompute auto: {problem}; give a number of blocks", path="recompute", got="auto")

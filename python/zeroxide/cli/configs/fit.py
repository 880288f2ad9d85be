"""Whether a model fits, told from its shapes: nothing of it is loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from zeroxide.cli.paths import written_path
from zeroxide.cli.quiet import quiet
from zeroxide.config import Config, format_bytes
from zeroxide.distributed import Ranks
from zeroxide.engine.resident import resident_without
from zeroxide.engine.rows import cut_by_config
from zeroxide.errors import ModelError
from zeroxide.plan.home import Home
from zeroxide.plan.plan import Plan, make_plan
from zeroxide.precision.policy import check_batch_norms, torch_dtype

__all__ = ["fit", "shapes"]

_OPTIMIZER = "zero_optimization.offload_optimizer.nvme_path"
_DISKS = "zeroxide.disks"
_PARAM = "zero_optimization.offload_param.nvme_path"


def shapes(model: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a Hugging Face directory, or of its config.json, on the meta device.

    No Python of the directory's own is run, and nobody is asked whether it may be. Raises ModelError where there is no
    model, and where transformers cannot build it.
    """
    path = _directory(model)
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"):
                return _build(config).to(dtype)
        # What a config says goes into transformers' arithmetic, where anything may come of it.
        except Exception as error:
            raise ModelError(f"--model {model} cannot be built: {_why(error)}", name=model) from None


def _directory(model: str) -> Path:
    """The directory with the model's config.json. Raises ModelError."""
    try:
        path = written_path(model)
        path = path.parent if path.name == "config.json" and path.is_file() else path
        if not (path / "config.json").is_file():
            raise ModelError(f"--model {model}: no config.json there", name=model)
    except OSError as error:
        raise ModelError(f"--model {model}: {error.strerror}", name=model) from None
    return path


def _build(config: Any) -> torch.nn.Module:
    """The model that a config describes: its first architecture that transformers has, else a language model."""
    for name in config.architectures or ():
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            named: torch.nn.Module = kind(config)
            return named
    made: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    return made


def _why(error: Exception) -> str:
    """One line of what went wrong in transformers."""
    lines = [" ".join(text.split()) for text in str(error).splitlines() if text.strip()]
    if any("trust_remote_code" in line for line in lines):
        return "it needs Python code of its own, which is not run to look at it; leave out --model"
    line = lines[0] if lines else ""
    if line.endswith(":") and len(lines) > 1:
        line = f"{line} {lines[1]}"
    if not isinstance(error, (OSError, ValueError, RuntimeError, ImportError)) or not line:
        line = f"{type(error).__name__}: {line}".removesuffix(": ")
    return line[:200]


def fit(
    config: Config, model: str, world: int, ranks_per_host: int
) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """The plan for rank 0 of `world`, in lines; notes; and what does not fit, as (key, line).

    Raises ModelError for a model that cannot be trained, BudgetError where a budget is too small for the state.
    """
    module = shapes(model, torch_dtype(config.precision.dtype))
    check_batch_norms(module, config)
    cut_by_config(module, config)
    one_host = ranks_per_host >= world
    ranks = Ranks(
        world=world, local_world=min(world, ranks_per_host), backend="fake", same_host=one_host, shares_memory=one_host
    )
    threads = config.zeroxide.threads or len(os.sched_getaffinity(0))
    plan = make_plan(module, config, threads=threads, resident=resident_without(module), ranks=ranks)
    facts = [f"model: {type(module).__name__}", *(f"plan: {line}" for line in plan.describe())]
    notes: list[str] = []
    _memory(plan, min(world, ranks_per_host), facts, notes)
    return facts, notes, list(_disk(plan, config, ranks, facts, notes))


def _memory(plan: Plan, local: int, facts: list[str], notes: list[str]) -> None:
    """What a process takes beside activations, against this machine; its budget is the plan's own matter."""
    need = plan.resident_before + plan.expected_peaks()["total"]
    facts.append(f"memory: {format_bytes(need)} a process beside activations")
    # Weights in host memory are one copy for the ranks of a host.
    shared = plan.buckets.get("weights", 0) if plan.weights is Home.HOST and plan.transport == "shared" else 0
    all_ranks = local * need - (local - 1) * shared
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if all_ranks > total:
        ranks = f"{local} ranks take" if local > 1 else "it takes"
        notes.append(f"{ranks} {format_bytes(all_ranks)} on a host, and this machine has {format_bytes(total)}")


def _disk(plan: Plan, config: Config, ranks: Ranks, facts: list[str], notes: list[str]) -> Iterator[tuple[str, str]]:
    """What the state takes on disk, against what is free there.

    The store deals its tiles out over its directories, whatever is in them: each has its part of all bytes, equal ones
    where disks are equally fast, and one disk the parts of all directories on it.
    """
    homes: dict[Path, str] = {}
    for key, home, path in (
        (_PARAM, plan.weights, config.zero.offload_param.path),
        (_OPTIMIZER, plan.state, config.zero.offload_optimizer.path),
    ):
        if home is Home.DISK and path is not None:
            homes.setdefault(path, key)
    for path in config.zeroxide.disks if homes else ():
        homes.setdefault(path, _DISKS)
    need = plan.disk_bytes * ranks.local_world
    if need == 0:
        return
    part = need // len(homes)
    divided = f", {format_bytes(part)} in each of {len(homes)} directories" if len(homes) > 1 else ""
    facts.append(f"disk: {format_bytes(need)} on each host{divided}")
    disks: dict[int, list[Path]] = {}
    for path, key in homes.items():
        try:
            disk = path.stat().st_dev
        except FileNotFoundError:
            notes.append(f"{path} ({key}) is not on this machine")
            continue
        except OSError as error:
            yield key, f"{key}: {path}: {error.strerror}"
            continue
        if not path.is_dir() or not os.access(path, os.W_OK):
            yield key, f"{key}: {path} is no directory that can be written to"
        else:
            disks.setdefault(disk, []).append(path)
    for paths in disks.values():
        key, free, wanted = homes[paths[0]], shutil.disk_usage(paths[0]).free, part * len(paths)
        if free < wanted:
            where = f"{' and '.join(map(str, paths))} {'has' if len(paths) == 1 else 'are on one disk, which has'}"
            yield key, f"{key}: {where} {format_bytes(free)} free, and {format_bytes(wanted)} are needed"

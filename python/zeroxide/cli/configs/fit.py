"""Whether a model fits, told from its shapes: nothing of it is loaded."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from zeroxide.config import Config, format_bytes
from zeroxide.distributed import Ranks
from zeroxide.engine.resident import resident_without
from zeroxide.errors import ModelError
from zeroxide.plan.home import Home
from zeroxide.plan.plan import Plan, make_plan
from zeroxide.precision.policy import check_batch_norms, torch_dtype

__all__ = ["fit", "shapes"]

_OPTIMIZER = "zero_optimization.offload_optimizer.nvme_path"
_PARAM = "zero_optimization.offload_param.nvme_path"


def shapes(model: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a Hugging Face directory, or of its config.json, on the meta device.

    Raises ModelError where there is none, and where transformers cannot build it.
    """
    path = Path(model).expanduser()
    path = path.parent if path.name == "config.json" and path.is_file() else path
    if not (path / "config.json").is_file():
        raise ModelError(f"--model {model}: no config.json there", name=model)
    with _quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
            names = [*(config.architectures or ()), "AutoModelForCausalLM", "AutoModel"]
            kind: Any = next(found for each in names if (found := getattr(transformers, each, None)) is not None)
            build = kind.from_config if hasattr(kind, "from_config") else kind
            with torch.device("meta"):
                made: torch.nn.Module = build(config)
        except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError, RuntimeError) as error:
            line = next((text for text in str(error).splitlines() if text.strip()), type(error).__name__)
            raise ModelError(f"--model {model} cannot be built: {line[:200]}", name=model) from None
    return made.to(dtype)


def fit(
    config: Config, model: str, world: int, ranks_per_host: int
) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """The plan for rank 0 of `world`, in lines; notes; and what does not fit, as (key, line).

    Raises ModelError for a model that cannot be trained, BudgetError where a budget is too small for the state.
    """
    module = shapes(model, torch_dtype(config.precision.dtype))
    check_batch_norms(module, config)
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
    """What the state takes on disk, against what is free there."""
    homes = {_PARAM: config.zero.offload_param.path, _OPTIMIZER: config.zero.offload_optimizer.path}
    need = plan.disk_bytes * ranks.local_world
    if need == 0:
        return
    facts.append(f"disk: {format_bytes(need)} on each host")
    for key, path in homes.items():
        if path is None:
            continue
        if not path.exists():
            notes.append(f"{path} ({key}) is not on this machine")
        elif not path.is_dir() or not os.access(path, os.W_OK):
            yield key, f"{key}: {path} is no directory that can be written to"
        elif (free := shutil.disk_usage(path).free) < need:
            yield key, f"{key}: {path} has {format_bytes(free)} free, and {format_bytes(need)} are needed"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what transformers says while it looks at a model off the terminal."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)

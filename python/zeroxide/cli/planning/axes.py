"""A job of any number of ranks on paper: what was asked of it, worked out, and in words."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from zeroxide.cli.planning.passes import meta_model
from zeroxide.cli.planning.work import base_config
from zeroxide.cli.quiet import quiet
from zeroxide.cli.training.loss import causal_lm_loss
from zeroxide.cli.training.models import ModelChoice
from zeroxide.config import load
from zeroxide.engine.on_paper.plan import JobPlan, plan_job
from zeroxide.engine.on_paper.traffic import KINDS
from zeroxide.errors import ConfigError, ModelError
from zeroxide.moe.spread import with_experts
from zeroxide.precision.policy import torch_dtype

__all__ = ["AskedAxes", "as_lines", "found_as_json", "has_axes", "plan_axes"]

_AXES = ("pp", "dp_replicate", "dp_shard", "sp", "tp", "ep")
_STATE = ("weights", "gradients", "optimizer")


@dataclass(frozen=True)
class AskedAxes:
    """What the command line says; None where the config does."""

    mesh: str | None = None
    """As "pp=4,tp=8"."""
    micro_batches: int | None = None
    stage: int | None = None
    schedule: str | None = None
    """Its name, and after a colon the stages of a rank."""
    checkpointing: bool = False
    batch: int | None = None
    """Sequences in a micro-batch."""

    def words(self) -> dict[str, Any]:
        """What only ranks on paper have."""
        return {
            "--micro-batches": self.micro_batches,
            "--stage": self.stage is not None,
            "--schedule": self.schedule,
            "--checkpointing": self.checkpointing,
        }


def has_axes(asked: AskedAxes, given: dict[str, Any]) -> bool:
    """Whether ranks are meant that have parts of a model or of a sequence."""
    own = given.get("zeroxide")
    mesh = own.get("mesh") if isinstance(own, dict) else None
    others = isinstance(mesh, dict) and any(mesh.get(axis, 1) != 1 for axis in ("pp", "sp", "tp", "ep"))
    cut = any(
        isinstance(given.get(section), dict) and given[section].get(key, 1) != 1
        for section, key in (
            ("pipeline", "stages"),
            ("tensor_parallel", "autotp_size"),
            ("expert_parallel", "autoep_size"),
        )
    )
    return asked.mesh is not None or others or cut or given.get("sequence_parallel_size", 1) != 1


def plan_axes(choice: ModelChoice, asked: AskedAxes, given: dict[str, Any], ranks: int, sequence: int) -> JobPlan:
    """What `ranks` ranks take. Raises ConfigError and ModelError, see `plan_job`."""
    config = load(_with_axes(given, asked), world_size=ranks)
    if config.zero.offload_param.kind == "nvme" or config.zero.offload_optimizer.kind == "nvme":
        raise ConfigError(
            "zero_optimization: disks are not planned for ranks on paper: leave out offload_param and "
            "offload_optimizer to a disk",
            path="zero_optimization",
        )
    dtype = torch_dtype(config.precision.dtype)
    with quiet():
        config = with_experts(config, meta_model(choice, dtype), ranks)

    def build() -> Any:
        model = meta_model(choice, dtype)
        if not config.tensor_parallel.vocab_parallel_lm_head:
            model.loss_function = causal_lm_loss
        return model

    def prepare(model: Any) -> None:
        if not asked.checkpointing:
            return
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ModelError(f"{choice.name} does not support activation checkpointing")
        # The method was renamed within transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    with quiet():
        return plan_job(build, config, ranks, sequence, prepare)


def _with_axes(given: dict[str, Any], asked: AskedAxes) -> dict[str, Any]:
    """The config with what the command line says."""
    config = copy.deepcopy(given) if given else base_config({})[0]
    config.setdefault("optimizer", {"type": "AdamW", "params": {"lr": 1e-4}})
    sizes = _sizes(asked.mesh)
    own = dict(config.get("zeroxide") or {})
    ep = sizes.get("ep", 1)
    if sizes:
        config["zeroxide"] = own | {"mesh": {**(own.get("mesh") or {}), **sizes}}
    if ep > 1:
        config["expert_parallel"] = {**(config.get("expert_parallel") or {}), "enabled": True, "autoep_size": ep}
    if asked.stage is not None:
        config["zero_optimization"] = {**(config.get("zero_optimization") or {}), "stage": asked.stage}
    elif "zero_optimization" not in config:
        config["zero_optimization"] = {"stage": 1}
    if asked.schedule is not None:
        name, _, chunks = asked.schedule.partition(":")
        if chunks and not chunks.isdecimal():
            raise ConfigError(
                f"--schedule {asked.schedule}: expected a name and a number of stages, as interleaved_1f1b:2",
                path="--schedule",
            )
        more = {"stages_per_rank": int(chunks)} if chunks else {}
        config["pipeline"] = {**(config.get("pipeline") or {}), "schedule": name, **more}
    if asked.batch is not None or asked.micro_batches is not None:
        config.pop("train_batch_size", None)
    config["train_micro_batch_size_per_gpu"] = asked.batch or config.get("train_micro_batch_size_per_gpu") or 1
    if asked.micro_batches is not None:
        config["gradient_accumulation_steps"] = asked.micro_batches
    return config


def _sizes(mesh: str | None) -> dict[str, int]:
    """The axes of `--mesh`. Raises ConfigError."""
    found: dict[str, int] = {}
    for each in (mesh or "").replace(" ", "").split(","):
        name, _, size = each.partition("=")
        if not each:
            continue
        if name not in _AXES or not size.isdecimal() or int(size) < 1 or name in found:
            raise ConfigError(
                f"--mesh: expected axes once each with their sizes, as pp=4,tp=8, of {', '.join(_AXES)}; got {each!r}",
                path="--mesh",
                expected=", ".join(_AXES),
                got=each,
            )
        found[name] = int(size)
    return found


def as_lines(model: str, found: JobPlan) -> Iterator[str]:
    """Two tables: what the ranks have, and what they send."""
    axes = (
        " x ".join(f"{name} {size}" for name in _AXES if name != "ep" and (size := getattr(found.axes, name)) > 1)
        or "alone"
    )
    experts = f", experts over {found.axes.ep}" if found.axes.ep > 1 else ""
    yield (
        f"{model}, {found.parameters / 1e9:.3g} B parameters, on {found.world:,} ranks: {axes}{experts}; "
        f"a step: {found.micro_batches} micro-batches of {found.batch} x {found.sequence} tokens, "
        f"{found.tokens:,} in all"
    )
    if found.axes.pp > 1:
        yield f"schedule {found.schedule}: {100 * found.bubble:.1f} % bubble"
    yield "held by a rank"
    yield _row("pipeline rank", "params", *_STATE, "other", "in flight", "activ.", "together")
    for each in found.ranks:
        state = [each.buckets.get(name, 0) for name in _STATE]
        sizes = [*state, sum(each.buckets.values()) - sum(state)]
        yield _row(
            str(each.rank),
            f"{each.parameters / 1e9:.3g} B",
            *map(_short, sizes),
            str(each.in_flight),
            *map(_short, (each.activations, each.held)),
        )
    kinds = [kind for kind in KINDS if any(each.sent_bytes(kind) for each in found.ranks)]
    yield "sent by a rank in a step"
    yield _row("pipeline rank", *kinds, "together")
    for each in found.ranks:
        yield _row(str(each.rank), *(_short(each.sent_bytes(kind)) for kind in kinds), _short(each.sent_bytes()))


def _row(first: str, *cells: str) -> str:
    return f"  {first:<14s}" + "".join(f"{each:>11s}" for each in cells)


def _short(count: int) -> str:
    """In three digits and a unit."""
    value, unit = float(count), "B"
    for each in ("K", "M", "G", "T"):
        if value < 999.5:
            break
        value, unit = value / 1024, f"{each}iB"
    return f"{value:.3g} {unit}" if count else "-"


def found_as_json(model: str, found: JobPlan) -> dict[str, Any]:
    """All of it as JSON has it, in bytes."""
    ranks = [{**asdict(each), "held": each.held, "sent_bytes": each.sent_bytes()} for each in found.ranks]
    return {
        "model": model,
        "world": found.world,
        "axes": {name: getattr(found.axes, name) for name in _AXES},
        "schedule": found.schedule,
        "micro_batches": found.micro_batches,
        "batch": found.batch,
        "sequence": found.sequence,
        "tokens": found.tokens,
        "parameters": found.parameters,
        "bubble": found.bubble,
        "ranks": ranks,
    }

"""Runs of the engine in every mode, and everything a run leaves that can be compared bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from models import Batch, batches, build, loss_of
from torch import nn

import zeroxide
from zeroxide.device.placement import spec
from zeroxide.engine.engine import Engine


@dataclass(frozen=True)
class Mode:
    """Where the state is and how it is moved: everything that must not change a bit."""

    param: str = "none"
    optimizer: str = "none"
    format: str = "fp32"
    threads: int = 1
    io: str = "auto"
    tile_bytes: int | None = None
    staging_bytes: int | None = None
    prefetch: int = 1

    def __str__(self) -> str:
        parts = [f"p-{self.param}", f"o-{self.optimizer}", self.format, f"{self.threads}t"]
        if "nvme" in (self.param, self.optimizer):
            parts += [self.io, f"tile-{self.tile_bytes}", f"ahead-{self.prefetch}"]
        return ".".join(parts)


REFERENCE = Mode()
TILE = 8192
STAGING = 1 << 20

COVERING = [
    Mode("cpu", "cpu", "split", 2),
    Mode("none", "nvme", "fp32", 2, "threads", TILE, STAGING),
    Mode("nvme", "cpu", "split", 1, "io_uring", TILE, STAGING, 0),
    Mode("nvme", "nvme", "split", 2, "io_uring", TILE, STAGING),
    Mode("nvme", "nvme", "fp32", 1, "threads", None, None, 3),
]
"""Every value of every field, and the pairs that meet in the code."""


def every_mode() -> Iterator[Mode]:
    """The full matrix."""
    for param, optimizer in itertools.product(("none", "cpu", "nvme"), repeat=2):
        on_disk = "nvme" in (param, optimizer)
        for format, threads in itertools.product(("split", "fp32"), (1, 2)):
            if not on_disk:
                yield Mode(param, optimizer, format, threads)
                continue
            for io, (tile, staging, prefetch) in itertools.product(
                ("io_uring", "threads"), ((TILE, STAGING, 0), (None, None, 2))
            ):
                yield Mode(param, optimizer, format, threads, io, tile, staging, prefetch)


def config_of(mode: Mode, directory: Path, dtype: str = "bf16", **more: Any) -> dict[str, Any]:
    """The mode as a config. `more` are further top-level keys."""

    def home(device: str) -> dict[str, Any]:
        return {"device": device, **({"nvme_path": str(directory)} if device == "nvme" else {})}

    own: dict[str, Any] = {
        "format": mode.format if dtype == "bf16" else "fp32",
        "threads": mode.threads,
        "io_engine": mode.io,
        "prefetch": mode.prefetch,
    }
    if mode.tile_bytes is not None:
        own |= {"tile_bytes": mode.tile_bytes, "staging_bytes": mode.staging_bytes}
    config: dict[str, Any] = {
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "gradient_clipping": 0,
        # As `module.to(dtype)` does, for batch norm, which torch computes in one dtype.
        "data_types": {"buffer_dtype": dtype},
        "zero_optimization": {
            "stage": 3,
            "offload_param": home(mode.param),
            "offload_optimizer": home(mode.optimizer),
        },
        "zeroxide": own,
        "steps_per_print": 10**9,
    }
    return config | more


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for matrices only, and a rate of its own for the rest."""
    trainable = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [param for param in trainable if param.dim() > 1], "weight_decay": 0.1},
        {"params": [param for param in trainable if param.dim() <= 1], "weight_decay": 0.0, "lr": 3e-3},
    ]


@dataclass
class Outcome:
    """What a run computed. `state` holds (master, first moment, second moment) by parameter name."""

    losses: list[float] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    state: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)


def state_of(engine: Engine, parts: Iterable[str] = ("weights", "exp_avg", "exp_avg_sq")) -> dict[str, tuple[Any, ...]]:
    """Exact weights and moments of every parameter, as fp32."""
    core, found = engine.parts.core(), {}
    for unit in engine.parts.units:
        for at, (name, shape) in enumerate(zip(unit.names, unit.shapes, strict=True)):
            values = []
            for part in parts:
                out = torch.empty(shape, dtype=torch.float32)
                core.read_param(unit.index, at, part, 0, spec(out.view(-1)))
                values.append(out)
            found[name] = tuple(values)
    return found


def weights_of(engine: Engine) -> dict[str, torch.Tensor]:
    """The live weights, as forward sees them."""
    found = {}
    for unit in engine.parts.units:
        engine.parts.gatherer.gather(unit)
        found |= {
            name: param.detach().to("cpu", copy=True) for name, param in zip(unit.names, unit.params, strict=True)
        }
        engine.parts.gatherer.release(unit)
    engine.parts.gatherer.release_all()
    return found


def assert_released(engine: Engine) -> None:
    """No parameter shows its weights, and no unit's memory is held."""
    assert [name for name, param in engine.module.named_parameters() if param.numel()] == []
    assert {unit.state.name for unit in engine.parts.units} == {"RELEASED"}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def assert_same(got: Outcome, expected: Outcome, what: str) -> None:
    """Bit for bit."""
    assert got.losses == expected.losses, f"{what}: losses"
    assert got.norms == expected.norms, f"{what}: norms"
    assert got.rates == expected.rates, f"{what}: rates"
    assert got.weights.keys() == expected.weights.keys()
    assert [n for n in got.weights if not same_bits(got.weights[n], expected.weights[n])] == [], f"{what}: weights"
    for name, parts in expected.state.items():
        for part, mine, theirs in zip(("master", "exp_avg", "exp_avg_sq"), got.state[name], parts, strict=True):
            assert same_bits(mine, theirs), f"{what}: {part} of {name}"
    assert [n for n in got.buffers if not same_bits(got.buffers[n], expected.buffers[n])] == [], f"{what}: buffers"


@contextmanager
def started(model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Engine]:
    """An engine that is destroyed whatever happens."""
    engine, *_ = zeroxide.initialize(model=model, *args, **kwargs)  # noqa: B026  # args follow the keyword on purpose
    try:
        yield engine
    finally:
        engine.destroy()


def train(
    family: str,
    mode: Mode,
    directory: Path,
    *,
    dtype: str = "bf16",
    steps: int = 50,
    watch: Callable[[Engine, int], None] = lambda engine, step: None,
    device: str = "cpu",
) -> Outcome:
    """`steps` optimizer steps of two micro-batches on `device` with everything on: clipping, decay groups, a schedule.

    The model is in host memory when it comes.
    """
    model = build(family)
    model.train()
    schedule = {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": 2 * steps, "warmup_num_steps": max(1, steps // 5)},
    }
    config = config_of(mode, directory, dtype, gradient_clipping=0.5, gradient_accumulation_steps=2, scheduler=schedule)
    config["zeroxide"] |= {"device": device}
    outcome = Outcome()
    feed = iter(batches(family, 2 * steps))
    with started(model, model_parameters=decay_groups(model), config=config) as engine:
        for step in range(steps):
            for _ in range(2):
                loss = loss_of(engine(**{name: value.to(device) for name, value in next(feed).items()}))
                engine.backward(loss)
                engine.step()
                outcome.losses.append(loss.item())
            outcome.norms.append(float(engine.get_global_grad_norm()))
            outcome.rates.append(engine.get_lr())
            watch(engine, step)
        assert engine.global_steps == steps
        assert engine.skipped_steps == 0
        assert_released(engine)
        outcome.weights = weights_of(engine)
        outcome.state = state_of(engine)
        outcome.buffers = {name: buffer.to("cpu", copy=True) for name, buffer in model.named_buffers()}
        assert_released(engine)
    return outcome


def micro_batches(family: str, steps: int) -> list[list[Batch]]:
    """The batches of `train`, grouped by optimizer step."""
    flat = batches(family, 2 * steps)
    return [flat[at : at + 2] for at in range(0, len(flat), 2)]

"""One contestant of `zeroxide bench`, in a process of its own, whose peak of memory is then its own.

One argument, a JSON object; one line of JSON on standard output. It is {"error": line} where zeroxide refuses.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

import zeroxide
from zeroxide import _core
from zeroxide.cli.measuring.model import VOCABULARY, Decoder
from zeroxide.device.placement import HOST
from zeroxide.errors import ZeroxideError

__all__ = ["Result", "Task", "Training", "measure"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one process does."""

    who: str
    """"torch" or "zeroxide"."""
    what: str
    """"update": optimizer steps alone; "train": whole steps."""
    offload: str = "none"
    """`zeroxide`'s home of everything: "none", "cpu" or "nvme:DIR"."""
    host_memory: str | None = None
    dtype: str = "bf16"
    layers: int = 8
    width: int = 512
    rows: int = 1
    columns: int = 128
    parameters: int = 50_000_000
    """Of "update"."""
    steps: int = 8
    """Steps that count; some before them do not."""
    threads: int | None = None
    """None for torch's own number."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What it saw."""

    seconds: list[float]
    """Of each step that counts, from its beginning to the next one's."""
    peak: int
    """Most resident bytes of the process, from before the model was made."""
    parameters: int
    loss: float | None = None
    """That of the last step."""
    disk_bytes: float = 0.0
    """Read and written, of a step."""


_WARM = 3


def _timed(step: Callable[[int], Any], count: int) -> list[float]:
    begun = []
    for at in range(_WARM + count + 1):
        begun.append(time.perf_counter())
        step(at)
    return [after - before for before, after in itertools.pairwise(begun[_WARM:])]


def _update(task: Task) -> Result:
    """Optimizer steps over `parameters` in fp32, in tensors of a million, with gradients that are there already."""
    size = 1_000_000
    tensors = [torch.zeros(size, device=HOST) for _ in range(max(1, task.parameters // size))]
    for each in tensors:
        each.requires_grad_()
        each.grad = torch.full_like(each, 1e-3)
    settings: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
    if task.who == "torch":
        optimizer: Any = torch.optim.AdamW(tensors, fused=True, **settings)
    else:
        optimizer = zeroxide.optim.AdamW(tensors, **settings)
    seconds = _timed(lambda _: optimizer.step(), task.steps)
    return Result(seconds=seconds, peak=_core.resident()["peak"], parameters=size * len(tensors))


def _batch(task: Task, step: int) -> torch.Tensor:
    generator = torch.Generator(HOST).manual_seed(step)
    return torch.randint(VOCABULARY, (task.rows, task.columns), generator=generator, device=HOST)


@dataclass(frozen=True)
class Training:
    """A model in training."""

    step: Callable[[int], float]
    """Makes the step of this number, and returns its loss."""
    moved: Callable[[], int] = lambda: 0
    """Bytes read and written so far."""
    end: Callable[[], None] = lambda: None


def _train_torch(task: Task, model: Decoder) -> Training:
    """Weights and state in fp32, forward in `dtype` by autocast, the norm clipped: what zeroxide does with bf16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(task.dtype)

    def step(at: int) -> float:
        with torch.autocast(HOST.type, dtype=low, enabled=low is not None):
            loss = model(_batch(task, at))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return Training(step)


def _train_zeroxide(task: Task, model: Decoder) -> Training:
    engine, *_ = zeroxide.initialize(
        model=model,
        lr=1e-4,
        weight_decay=0.01,
        gradient_clipping=1.0,
        dtype=task.dtype,
        offload=task.offload,
        host_memory=task.host_memory,
        config={"zeroxide": {"device": "cpu"}},
    )

    def step(at: int) -> float:
        loss = engine(_batch(task, at))
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    def moved() -> int:
        io = engine.io()
        return int(io["read_bytes"] + io["write_bytes"])

    return Training(step, moved, engine.destroy)


def _train(task: Task) -> Result:
    torch.manual_seed(0)
    model = Decoder(task.layers, task.width, task.columns)
    count = sum(each.numel() for each in model.parameters())
    training = (_train_torch if task.who == "torch" else _train_zeroxide)(task, model)
    losses: list[float] = []
    traffic: list[int] = []

    def counted(at: int) -> None:
        traffic.append(training.moved())
        losses.append(training.step(at))

    try:
        seconds = _timed(counted, task.steps)
    finally:
        training.end()
    per_step = (traffic[-1] - traffic[_WARM]) / task.steps
    peak = _core.resident()["peak"]
    return Result(seconds=seconds, peak=peak, parameters=count, loss=losses[-1], disk_bytes=per_step)


def measure(task: Task) -> Result:
    """Does it, in this process. Raises ZeroxideError."""
    return _update(task) if task.what == "update" else _train(task)


def main() -> None:
    """Does what the argument says."""
    task = Task(**json.loads(sys.argv[1]))
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    try:
        found: dict[str, Any] = asdict(measure(task))
    except ZeroxideError as error:
        found = {"error": error.message}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

"""Two steps of the engine beside two of plain PyTorch, compared bit for bit where nothing but a fault could differ.

Both sides compute the same operations in the same order on the same bits, so losses are equal, and so are gradients.
They are compared through the first moments, which hold (1 - b1) g. Weights and moments are allowed the roundings of two
evaluations of AdamW (`bound.Bound`), no more. Before the second step the plain model takes over the engine's live
weights, which the first comparison has found right, so that the second forward and backward are compared exactly too
and nothing that AdamW magnifies (a gradient near 0) loosens a bound.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from bound import BETAS, EPS, Bound, half_up
from running import started, state_of, weights_of
from small_models import Batch, Small
from torch import nn

import zeroxide.plan.discover
from zeroxide.engine.engine import Engine

RATE, DECAY = 1e-3, 0.01
STEPS = 2


@dataclass(frozen=True)
class Mode:
    """One way to run a type."""

    name: str
    dtype: str = "fp32"
    checkpointing: bool = False
    unit_bytes: int | None = 8
    """Largest unit; 8 bytes cut every block and the root by owner. None is the default."""


MODES = {
    mode.name: mode
    for mode in (
        Mode("tiny"),
        Mode("checkpointing", checkpointing=True),
        Mode("bf16", dtype="bf16"),
        Mode("whole", unit_bytes=None),
        Mode("whole-checkpointing", checkpointing=True, unit_bytes=None),
        Mode("whole-bf16", dtype="bf16", unit_bytes=None),
    )
}


class Skipped(Exception):
    """The comparison has no plain side: torch cannot run this, or does not repeat itself."""


class Differs(Exception):
    """The engine computed something else than plain torch."""


def seed_everything(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)  # models of speech draw their masks from the global generator
    torch.manual_seed(seed)


def prepared(small: Small, mode: Mode) -> nn.Module:
    """The model in training, checkpointing itself if the mode says so."""
    model = small.build()
    if mode.checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise Skipped("the type has no gradient checkpointing")
        try:
            model.gradient_checkpointing_enable()
        except (ValueError, AttributeError, NotImplementedError) as error:
            raise Skipped(f"gradient checkpointing: {error}") from error
        model.train()
    return model


def cast_batch(batch: Batch, dtype: str) -> Batch:
    """Floating-point inputs in bf16, as the engine casts them."""
    if dtype != "bf16":
        return batch
    return {
        name: value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }


class Plain:
    """Plain PyTorch: the model itself, and for each trainable parameter an fp32 master with torch's AdamW."""

    def __init__(self, small: Small, mode: Mode, like: nn.Module) -> None:
        self.small = small
        self.model = prepared(small, mode)
        self.masters = {name: nn.Parameter(param.detach().float().clone()) for name, param in self._trainable()}
        self.dtypes = {name: param.dtype for name, param in like.named_parameters()}
        for name, param in self.model.named_parameters():
            param.data = live(param.data.float(), self.dtypes[name]).view(param.shape)
        buffers = {name: buffer.dtype for name, buffer in like.named_buffers()}
        for prefix, owner in self.model.named_modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[name] = buffer.to(buffers[f"{prefix}.{name}" if prefix else name])
        self.optimizer = torch.optim.AdamW(
            self.masters.values(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY, foreach=False, fused=False
        )
        self.bounds = {name: Bound(master.shape) for name, master in self.masters.items()}

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, param) for name, param in self.model.named_parameters() if param.requires_grad]

    def gradients(self, batch: Batch, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, and the gradients that there are."""
        self.model.zero_grad(set_to_none=True)
        seed_everything(seed)
        loss = self.small.loss(self.model, self.small.call(self.model, batch))
        loss.backward()
        found = {name: param.grad for name, param in self._trainable() if param.grad is not None}
        # A forward that casts its own module for good (a router to fp32) leaves plain torch with other dtypes.
        found = {name: grad.to(self.dtypes[name]) for name, grad in found.items()}
        return loss.detach(), {name: g.to_dense() if g.is_sparse else g for name, g in found.items()}

    def step(self, grads: dict[str, torch.Tensor]) -> None:
        for name, master in self.masters.items():
            grad = grads.get(name)
            master.grad = None if grad is None else grad.float()
            if grad is not None:
                self.bounds[name].step(master.detach(), master.grad, RATE, DECAY)
        self.optimizer.step()


def live(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weights that forward sees for fp32 masters."""
    return half_up(values.contiguous()) if dtype is torch.bfloat16 else values.to(dtype).clone()


def repeats(small: Small, mode: Mode, batch: Batch, like: nn.Module) -> Plain:
    """A plain side, after a look whether two of its kind agree on every bit. Raises Skipped where torch has none."""
    try:
        first, again = Plain(small, mode, like), Plain(small, mode, like)
        one, two = first.gradients(batch, 0), again.gradients(batch, 0)
    except Skipped:
        raise
    except Exception as error:
        raise Skipped(f"plain torch: {type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    if not torch.isfinite(one[0]):
        raise Skipped(f"plain torch: the loss is {one[0].item()}")
    if not torch.equal(one[0], two[0]) or one[1].keys() != two[1].keys():
        raise Skipped("two runs of plain torch differ")
    if any(not torch.equal(grad, two[1][name]) for name, grad in one[1].items()):
        raise Skipped("two runs of plain torch differ in a gradient")
    if any(not torch.isfinite(grad).all() for grad in one[1].values()):
        raise Skipped("plain torch: a gradient is not finite")
    return Plain(small, mode, like)


def config_of(mode: Mode, directory: Path) -> dict[str, Any]:
    """Stage 3, weights and optimizer state on disk."""
    home = {"device": "nvme", "nvme_path": str(directory)}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": mode.dtype == "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": RATE, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "offload_param": home, "offload_optimizer": home},
        "zeroxide": {"threads": 1},
        "steps_per_print": 10**9,
    }


def forced_units(mode: Mode) -> Callable[[], None]:
    """Makes plans with units as small as the mode wants, which the config would refuse. Returns how to undo it."""
    before = zeroxide.plan.discover.DEFAULT_UNIT_BYTES
    if mode.unit_bytes is not None:
        zeroxide.plan.discover.DEFAULT_UNIT_BYTES = mode.unit_bytes

    def undo() -> None:
        zeroxide.plan.discover.DEFAULT_UNIT_BYTES = before

    return undo


def compare(small: Small, mode: Mode, directory: Path) -> str:
    """Runs both sides. Returns what was compared; raises Skipped or Differs, or what the engine raises."""
    model = prepared(small, mode)
    undo = forced_units(mode)
    try:
        with started(model, config=config_of(mode, directory)) as engine:
            batches = [cast_batch(small.batch(seed), mode.dtype) for seed in range(STEPS)]
            plain = repeats(small, mode, batches[0], model)
            for step, batch in enumerate(batches):
                _compare_step(engine, plain, batch, step)
            _compare_buffers(model, plain.model)
            return f"{len(engine.plan().units)} units, {len(plain.masters)} parameters"
    finally:
        undo()


def _compare_step(engine: Engine, plain: Plain, batch: Batch, step: int) -> None:
    wanted, grads = plain.gradients(batch, step)
    seed_everything(step)
    loss = plain.small.loss(engine.module, plain.small.call(engine, batch))
    if not torch.equal(loss.detach(), wanted):
        raise Differs(f"loss {step + 1} is {loss.item()!r}, plain torch has {wanted.item()!r}")
    engine.backward(loss)
    engine.step()
    plain.step(grads)
    states, weights = state_of(engine), weights_of(engine)
    params = dict(plain.model.named_parameters())
    for name, master in plain.masters.items():
        value, first, second = states[name]
        state = plain.optimizer.state.get(master, {})
        _compare_parameter(
            f"{name} after step {step + 1}", value, first, second, master.detach(), state, plain.bounds[name]
        )
        if not torch.equal(weights[name], live(value, plain.dtypes[name])):
            raise Differs(f"{name} after step {step + 1}: the live weight is not its master rounded")
    for name, param in params.items():
        if name not in plain.masters and not torch.equal(weights[name], param):
            raise Differs(f"{name} is frozen and has changed")
        with torch.no_grad():
            param.copy_(weights[name])
    # From the same bits, so that the bound holds for the next step alone.
    for name, master in plain.masters.items():
        plain.bounds[name].dp.zero_()
        with torch.no_grad():
            master.copy_(states[name][0])


def _compare_parameter(
    what: str,
    value: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    master: torch.Tensor,
    state: dict[str, Any],
    bound: Bound,
) -> None:
    if not state:
        if first.any() or second.any() or not torch.equal(value, master):
            raise Differs(f"{what}: it has no gradient in plain torch, and yet was stepped")
        return
    # Subnormal numbers round absolutely, by at most 2^-150 an operation; in the update, before the division by eps.
    tiny = 2.0**-147
    for part, mine, theirs, allowed in (
        ("gradient (first moment)", first, state["exp_avg"], 2 * bound.dm + tiny),
        ("second moment", second, state["exp_avg_sq"], 2 * bound.dv + tiny),
        ("weight", value, master, 2 * bound.dp + tiny / EPS),
    ):
        apart = (mine.double() - theirs.double()).abs()
        wrong = ~(apart <= allowed)
        if wrong.any():
            at = int((apart - allowed).flatten().nan_to_num(float("inf")).argmax())
            raise Differs(
                f"{what}: {part} differs in {int(wrong.sum())} of {wrong.numel()} elements, at most "
                f"{mine.flatten()[at].item():.9g} where plain torch has {theirs.flatten()[at].item():.9g}"
            )


def _compare_buffers(model: nn.Module, plain: nn.Module) -> None:
    theirs = dict(plain.named_buffers())
    for name, buffer in model.named_buffers():
        if not torch.equal(buffer.nan_to_num(), theirs[name].nan_to_num()):
            raise Differs(f"buffer {name} differs")

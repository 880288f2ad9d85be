"""One optimizer step over state on a device, in the formats and with the bits of the CPU kernels.

`cuda/kernels/{adam,lion,adagrad,sgd}.cu`, one entry point for each format.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from ctypes import Structure, c_int64, c_uint32, c_void_p
from dataclasses import dataclass

import torch

from zeroxide import _core
from zeroxide.device.placement import address
from zeroxide.errors import TensorError
from zeroxide.kernels.arguments import FLOATS, blocks_for, check, dtype_number
from zeroxide.kernels.constants import CONSTANTS, coupled
from zeroxide.kernels.launch import Kernel, Launcher

__all__ = ["CODECS", "KERNELS", "Step", "state_tensors", "update"]

THREADS = 256
EACH = 8

CODECS = {("fp32", "f32"): "fp32", ("fp32", "bf16"): "master_bf16", ("fp32", "f16"): "master_f16",
          ("split", "bf16"): "split"}  # fmt: skip
"""What entry points call a state format for weights of a dtype."""

KERNELS = tuple(
    Kernel("adam" if rule == "adamw" else rule, f"zx_{rule}_{codec}", THREADS)
    for rule in ("adam", "adamw", "lion", "adagrad", "sgd")
    for codec in CODECS.values()
)
_BY_ENTRY = {kernel.entry: kernel for kernel in KERNELS}


def _arguments(constants: type[Structure]) -> type[Structure]:
    """`zx::UpdateArgs` of the rule with those constants."""

    class Arguments(Structure):
        _fields_ = (
            ("live", c_void_p),
            ("exact", c_void_p),
            ("first", c_void_p),
            ("second", c_void_p),
            ("grad", c_void_p),
            ("elements", c_int64),
            ("grad_dtype", c_uint32),
            ("rule", constants),
        )

    return Arguments


_ARGUMENTS = {rule: _arguments(constants) for rule, (constants, _) in CONSTANTS.items()}


@dataclass(frozen=True)
class Step:
    """One step of a rule. All elements share it.

    rule: its name in a parameter group. hyperparameters: all of them, by name, as `_core.RULES[rule].hyperparameters`
    lists them. number: of the step, from 1. grad_scale: multiplies every gradient first. Raises what the rule raises
    for a hyperparameter that is outside of its range.
    """

    rule: str
    hyperparameters: Mapping[str, float]
    number: int = 1
    grad_scale: float = 1.0

    def __post_init__(self) -> None:
        self.core_rule()
        if self.number < 1:
            raise ValueError(f"step {self.number}: steps are counted from 1")

    def core_rule(self) -> _core.Rule:
        """The rule as the core takes it."""
        return _core.RULES[self.rule](**self.hyperparameters)


def state_tensors(step: Step, format: str, live: torch.dtype) -> list[tuple[str, torch.dtype]]:
    """Name and dtype of each state tensor, the live weight first."""
    return list(_state_tensors(step.rule, tuple(step.hyperparameters.items()), format, live))


@functools.lru_cache(maxsize=256)
def _state_tensors(
    rule: str, hyperparameters: tuple[tuple[str, float], ...], format: str, live: torch.dtype
) -> tuple[tuple[str, torch.dtype], ...]:
    """The same, asked of the core once: an update of every range of parameters wants to know."""
    listed = _core.state_tensors(_core.RULES[rule](**dict(hyperparameters)), format, FLOATS[live])
    return tuple((name, getattr(torch, dtype)) for name, dtype, _, _ in listed)


def update(launcher: Launcher, step: Step, format: str, tensors: Sequence[torch.Tensor], grad: torch.Tensor) -> None:
    """Updates a range of parameters in place.

    format: "fp32" or "split". tensors: the state tensors in the core's order: the live weight (fp32, bf16 or fp16),
    what makes it exact, the rule's own. grad: fp32, bf16 or fp16. All contiguous, of one device and as many elements.
    Raises TensorError.
    """
    if not tensors:
        raise TensorError("update: no tensors: expected the live weight", name="tensors", expected="one", got="none")
    live = tensors[0]
    check("update", "the live weight", live, FLOATS)
    expected = state_tensors(step, format, live.dtype)
    if len(tensors) != len(expected):
        names = ", ".join(name for name, _ in expected)
        raise TensorError(
            f"update: {len(tensors)} tensors: expected {names}", name="tensors", expected=names, got=str(len(tensors))
        )
    for tensor, (name, dtype) in zip(tensors, expected, strict=True):
        check("update", name, tensor, [dtype], like=live, numel=live.numel())
    check("update", "the gradient", grad, FLOATS, like=live, numel=live.numel())
    if live.numel() == 0:
        return
    codec = CODECS[format, FLOATS[live.dtype]]
    moments = [address(tensor) for tensor in tensors[1 if codec == "fp32" else 2 :]]
    _, prepare = CONSTANTS[step.rule]
    args = _ARGUMENTS[step.rule](
        address(live),
        None if codec == "fp32" else address(tensors[1]),
        moments[0],
        moments[1] if len(moments) > 1 else None,
        address(grad),
        live.numel(),
        dtype_number(grad.dtype),
        prepare(step.hyperparameters, step.number, step.grad_scale),
    )
    rule = "adamw" if step.rule == "adam" and not coupled(step.hyperparameters) else step.rule
    launcher.launch(_BY_ENTRY[f"zx_{rule}_{codec}"], blocks_for(live.numel(), THREADS * EACH), bytes(args))

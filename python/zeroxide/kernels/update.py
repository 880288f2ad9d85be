"""One optimizer step over state on a device, in the formats and with the bits of the CPU kernels.

`cuda/kernels/{adam,lion,adagrad,sgd}.cu`, one entry point for each format.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ctypes import Structure, c_int64, c_uint32, c_uint64, c_void_p, sizeof

import torch

from zeroxide.device.placement import address, addresses
from zeroxide.errors import TensorError
from zeroxide.kernels.arguments import FLOATS, blocks_for, check, dtype_number
from zeroxide.kernels.constants import CONSTANTS
from zeroxide.kernels.core_update import reference
from zeroxide.kernels.fallback import by_torch
from zeroxide.kernels.launch import Kernel, Launcher
from zeroxide.kernels.step import BLOCK, CODECS, ROUNDING, Step, state_tensors

__all__ = ["KERNELS", "Step", "state_tensors", "update"]

THREADS = 256
EACH = 8

AT_ONCE = 1 << 22
"""Elements that the CPU updates at once where there is no kernel: so many are copied to host memory."""

KERNELS = tuple(
    Kernel("adam" if rule == "adamw" else rule, f"zx_{rule}_{codec}", THREADS)
    for rule in ("adam", "adamw", "lion", "adagrad", "sgd")
    for codec in CODECS.values()
)
_BY_RULE = {tuple(kernel.entry.removeprefix("zx_").split("_", 1)): kernel for kernel in KERNELS}


def _arguments(constants: type[Structure], *, rounding: bool) -> type[Structure]:
    """`zx::UpdateArgs` of the rule with those constants, or `zx::RoundingArgs`."""

    class Arguments(Structure):
        _fields_ = (
            ("live", c_void_p),
            ("exact", c_void_p),
            ("first", c_void_p),
            ("second", c_void_p),
            ("grad", c_void_p),
            ("elements", c_int64),
            *((("stream", c_uint64), ("updates", c_uint64)) if rounding else ()),
            ("grad_dtype", c_uint32),
            ("rule", constants),
        )

    return Arguments


def _padding(arguments: dict[str, type[Structure]]) -> dict[str, bytes]:
    """What is behind the constants, by rule."""
    return {
        rule: bytes(sizeof(each) - each.rule.offset - sizeof(CONSTANTS[rule][0])) for rule, each in arguments.items()
    }


_ARGUMENTS = {rule: _arguments(constants, rounding=False) for rule, (constants, _) in CONSTANTS.items()}
_ROUNDING_ARGUMENTS = {rule: _arguments(constants, rounding=True) for rule, (constants, _) in CONSTANTS.items()}
_PACK, _ROUNDING_PACK = struct.Struct("=5QqI").pack, struct.Struct("=5Qq2QI").pack
"""The bytes of these but for their constants, which are the same for all of a step and begin where this ends."""
_PADDING, _ROUNDING_PADDING = _padding(_ARGUMENTS), _padding(_ROUNDING_ARGUMENTS)


def update(
    launcher: Launcher,
    step: Step,
    format: str,
    tensors: Sequence[torch.Tensor],
    grad: torch.Tensor,
    stream: int = 0,
) -> None:
    """Updates a range of parameters in place; in a format that rounds, the elements of one parameter.

    format: "fp32", "split", "split-bf16" or "compact". tensors: the state tensors in the core's order: the live weight
    (fp32, bf16 or fp16), what makes it exact, the rule's own. grad: fp32, bf16 or fp16. All contiguous, of one device
    and as many elements; the moments of "compact" are int16, 33 for each block of 64 elements that has begun, of which
    codes beyond the last element stand for zero. stream: the random bits of the parameter (`rounding_stream`), of which
    a format that rounds takes those of step `step.number - 1`.
    Raises TensorError.
    """
    if not tensors:
        raise TensorError("update: no tensors: expected the live weight", name="tensors", expected="one", got="none")
    live = tensors[0]
    check("update", "the live weight", live, FLOATS)
    expected = state_tensors(step, format, live.dtype)
    if len(tensors) != len(expected):
        names = ", ".join(each.name for each in expected)
        raise TensorError(
            f"update: {len(tensors)} tensors: expected {names}", name="tensors", expected=names, got=str(len(tensors))
        )
    numel, device = live.numel(), live.device
    for tensor, (name, dtype, per_block) in zip(tensors, expected, strict=True):
        stored = numel if per_block == BLOCK else -(-numel // BLOCK) * per_block
        if (
            tensor.dtype is not dtype
            or tensor.numel() != stored
            or tensor.device != device
            or not tensor.is_contiguous()
        ):
            check("update", name, tensor, [dtype], like=live, numel=stored)
    check("update", "the gradient", grad, FLOATS, like=live, numel=numel)
    if numel == 0:
        return
    codec = CODECS[format, FLOATS[live.dtype]]
    kernel = _BY_RULE[step.kernel_rule, codec]
    if by_torch(launcher, kernel):
        _by_core(step, format, tensors, grad, stream)
        return
    first, *others = addresses(tensors)
    exact = 0 if codec == "fp32" else others.pop(0)
    places = first, exact, others[0], others[1] if len(others) > 1 else 0, address(grad), numel
    dtype_at = dtype_number(grad.dtype)
    if codec in ROUNDING:
        args, padding = _ROUNDING_PACK(*places, stream, step.number - 1, dtype_at), _ROUNDING_PADDING
    else:
        args, padding = _PACK(*places, dtype_at), _PADDING
    launcher.launch(kernel, blocks_for(numel, THREADS * EACH), args + step.constants + padding[step.rule])


def _by_core(step: Step, format: str, tensors: Sequence[torch.Tensor], grad: torch.Tensor, stream: int) -> None:
    """The same without a kernel, and with its bits: by the CPU, on copies in host memory."""
    at_once, numel = max(AT_ONCE // BLOCK, 1) * BLOCK, grad.numel()
    expected = state_tensors(step, format, tensors[0].dtype)
    for start in range(0, numel, at_once):
        where = slice(start, min(start + at_once, numel))
        parts = [each.view(-1)[kind.place(where)] for each, kind in zip(tensors, expected, strict=True)]
        after = reference(step, format, parts, grad.view(-1)[where], stream, start)
        for part, values in zip(parts, after, strict=True):
            part.copy_(values)

"""The constants of one optimizer step, in double precision and then as fp32: what the files in `rules/` of
`zeroxide-optim` prepare, in the layout of the structs in `cuda/kernels/`.

Every function takes a rule's hyperparameters, the number of the step from 1 on, and what gradients are multiplied by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from ctypes import Structure, c_float

__all__ = ["CONSTANTS", "Adagrad", "Adam", "Lion", "Sgd", "coupled"]

Hyperparameters = Mapping[str, float]


class _Pair(Structure):
    """A constant as an fp32 value and what that leaves out."""

    _fields_ = (("head", c_float), ("tail", c_float))


def _pair(constant: float) -> _Pair:
    head = c_float(constant).value
    return _Pair(head, constant - head)


class Adam(Structure):
    """`zx::AdamConstants`."""

    _fields_ = (
        ("mean_keep", _Pair),
        ("mean_new", _Pair),
        ("square_keep", _Pair),
        ("root_new", _Pair),
        ("eps", _Pair),
        ("minus_step", _Pair),
        ("weight_decay", _Pair),
        ("grad_scale", _Pair),
        ("shrink", c_float),
    )


def coupled(given: Hyperparameters) -> bool:
    """Whether Adam adds a weight decay to the gradient instead of shrinking the weight."""
    return not given["decoupled"] and given["weight_decay"] != 0.0


def adam(given: Hyperparameters, step: int, grad_scale: float) -> Adam:
    """Constants of Adam and AdamW."""
    correction1 = correction2 = 1.0
    if given["bias_correction"]:
        correction1 = 1.0 - math.pow(given["beta1"], step)
        correction2 = 1.0 - math.pow(given["beta2"], step)
    shrink = given["lr"] * given["weight_decay"] if given["decoupled"] else 0.0
    merged_scale = 1.0 if coupled(given) else grad_scale
    return Adam(
        mean_keep=_pair(given["beta1"]),
        mean_new=_pair((1.0 - given["beta1"]) * merged_scale),
        square_keep=_pair(given["beta2"]),
        root_new=_pair(math.sqrt(1.0 - given["beta2"]) * merged_scale),
        eps=_pair(given["eps"] * math.sqrt(correction2)),
        minus_step=_pair(-given["lr"] * math.sqrt(correction2) / correction1),
        weight_decay=_pair(given["weight_decay"]),
        grad_scale=_pair(grad_scale),
        shrink=-shrink,
    )


class Lion(Structure):
    """`zx::Lion`."""

    _fields_ = tuple(
        (name, c_float) for name in ("direction_keep", "direction_new", "mean_keep", "mean_new", "minus_lr", "shrink")
    )


def lion(given: Hyperparameters, step: int, grad_scale: float) -> Lion:
    """Constants of Lion, which are the same in every step."""
    return Lion(
        direction_keep=given["beta1"],
        direction_new=(1.0 - given["beta1"]) * grad_scale,
        mean_keep=given["beta2"],
        mean_new=(1.0 - given["beta2"]) * grad_scale,
        minus_lr=-given["lr"],
        shrink=-given["lr"] * given["weight_decay"],
    )


class Adagrad(Structure):
    """`zx::Adagrad`."""

    _fields_ = tuple((name, c_float) for name in ("grad_scale", "weight_decay", "eps", "minus_step"))


def adagrad(given: Hyperparameters, step: int, grad_scale: float) -> Adagrad:
    """Constants of Adagrad."""
    return Adagrad(
        grad_scale=grad_scale,
        weight_decay=given["weight_decay"],
        eps=given["eps"],
        minus_step=-given["lr"] / (1.0 + (step - 1) * given["lr_decay"]),
    )


class Sgd(Structure):
    """`zx::Sgd`."""

    _fields_ = tuple(
        (name, c_float) for name in ("grad_scale", "weight_decay", "keep", "fresh", "minus_lr_grad", "minus_lr_buffer")
    )


def sgd(given: Hyperparameters, step: int, grad_scale: float) -> Sgd:
    """Constants of SGD: without momentum there is no buffer, and so no dampening."""
    undamped = step == 1 or given["momentum"] == 0.0
    return Sgd(
        grad_scale=grad_scale,
        weight_decay=given["weight_decay"],
        keep=given["momentum"],
        fresh=1.0 if undamped else 1.0 - given["dampening"],
        minus_lr_grad=-given["lr"] if given["nesterov"] else 0.0,
        minus_lr_buffer=-given["lr"] * given["momentum"] if given["nesterov"] else -given["lr"],
    )


CONSTANTS: dict[str, tuple[type[Structure], Callable[[Hyperparameters, int, float], Structure]]] = {
    "adam": (Adam, adam),
    "lion": (Lion, lion),
    "adagrad": (Adagrad, adagrad),
    "sgd": (Sgd, sgd),
}
"""The struct of each rule, and what prepares it."""

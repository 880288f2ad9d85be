"""`safe_get_*` and `safe_set_*`: exact weights, gradients and optimizer state of an engine's parameters.

DeepSpeed's names. The full versions give or take a whole parameter and are called by every rank; the local versions
give or take this rank's part of it, flat, whose elements may be none. Values are fp32, whatever the format keeps.

Gradients are those that the next step would use: averaged over ranks and summed over the micro-batches so far, without
clipping and, with fp16, times the loss scale. They exist from a backward to the step that uses them.
"""

from __future__ import annotations

import torch

from zeroxide.device.placement import to_host
from zeroxide.errors import ConfigError, ModelError
from zeroxide.precision.bits import ORDINARY
from zeroxide.zero.param import ShardedParam, sharded_param_of

__all__ = [
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
]


def safe_get_full_fp32_param(param: torch.Tensor) -> torch.Tensor | None:
    """The exact weight, in the parameter's shape; None for a parameter of no engine.

    A frozen one is given as fp32 where that holds every value of its dtype, else ModelError is raised.
    """
    sharded = sharded_param_of(param)
    return None if sharded is None else _full(param, sharded, "weights")


def safe_get_full_optimizer_state(param: torch.Tensor, optim_state_key: str) -> torch.Tensor | None:
    """A state tensor of the optimizer, in the parameter's shape; None for a frozen parameter and for one of no engine.

    optim_state_key: what the parameter's optimizer calls it: "exp_avg" and "exp_avg_sq" for Adam, "exp_avg" for Lion,
    "sum" for Adagrad, "momentum_buffer" for SGD; anything else raises ConfigError.
    """
    sharded = sharded_param_of(param)
    if sharded is None or not sharded.trainable:
        return None
    return _full(param, sharded, _key(sharded, optim_state_key))


def safe_get_full_grad(param: torch.Tensor) -> torch.Tensor | None:
    """The gradient, in the parameter's shape; None where no rank's backward gave one since the last step."""
    sharded = sharded_param_of(param)
    return None if sharded is None or not sharded.has_gradient(True) else _full(param, sharded, "grad")


def safe_set_full_fp32_param(param: torch.Tensor, value: torch.Tensor) -> None:
    """Makes rank 0's `value` the exact weight, and its rounding the live one. Optimizer state stays as it is.

    Raises ModelError for a parameter of no engine, for a frozen one that is not fp32, bf16 or fp16, or when `value` has
    another number of elements.
    """
    _set_full(param, _settable(param), "weights", value)


def safe_set_full_optimizer_state(param: torch.Tensor, value: torch.Tensor, optim_state_key: str) -> None:
    """Makes rank 0's `value` the state tensor `optim_state_key`. Raises ModelError, also for a frozen one, and
    ConfigError for a key that the parameter's optimizer does not have."""
    sharded = _trainable(param)
    _set_full(param, sharded, _key(sharded, optim_state_key), value)


def safe_set_full_grad(param: torch.Tensor, value: torch.Tensor) -> None:
    """Makes rank 0's `value` the gradient. Raises as `safe_set_full_fp32_param`, and for frozen parameters."""
    _set_full(param, _trainable(param), "grad", value)


def safe_get_local_fp32_param(param: torch.Tensor) -> torch.Tensor | None:
    """This rank's part of the exact weight; None for a parameter of no engine."""
    sharded = sharded_param_of(param)
    return None if sharded is None else sharded.read_own("weights")


def safe_get_local_optimizer_state(param: torch.Tensor, optim_state_key: str) -> torch.Tensor | None:
    """This rank's part of a state tensor; None for a frozen parameter and for one of no engine."""
    sharded = sharded_param_of(param)
    return None if sharded is None or not sharded.trainable else sharded.read_own(_key(sharded, optim_state_key))


def safe_get_local_grad(param: torch.Tensor) -> torch.Tensor | None:
    """This rank's part of the gradient; None where this rank's backward gave the parameter none."""
    sharded = sharded_param_of(param)
    return None if sharded is None or not sharded.has_gradient(False) else sharded.read_own("grad")


def safe_set_local_fp32_param(param: torch.Tensor, value: torch.Tensor) -> None:
    """Replaces this rank's part of the exact weight. Every rank calls it, those with no elements with an empty tensor.

    Raises ModelError as `safe_set_full_fp32_param`, before anything has changed.
    """
    _set_local(_settable(param), "weights", value)


def safe_set_local_optimizer_state(param: torch.Tensor, value: torch.Tensor, optim_state_key: str) -> None:
    """Replaces this rank's part of a state tensor. Every rank calls it."""
    sharded = _trainable(param)
    _set_local(sharded, _key(sharded, optim_state_key), value)


def safe_set_local_grad(param: torch.Tensor, value: torch.Tensor) -> None:
    """Replaces this rank's part of the gradient. Every rank calls it."""
    _set_local(_trainable(param), "grad", value)


def _full(param: torch.Tensor, sharded: ShardedParam, part: str) -> torch.Tensor:
    return sharded.context.whole.of(param, sharded.read(part).view(sharded.shape))


def _key(sharded: ShardedParam, name: str) -> str:
    if name not in sharded.states:
        expected = " or ".join(f'"{each}"' for each in sharded.states)
        raise ConfigError(
            f"optim_state_key: expected {expected}, which the optimizer of {sharded.name} has, got {name!r}",
            path="optim_state_key",
            expected=expected,
            got=str(name),
        )
    return name


def _required(param: torch.Tensor) -> ShardedParam:
    sharded = sharded_param_of(param)
    if sharded is None:
        raise ModelError(
            f"a parameter of shape {tuple(param.shape)} belongs to no engine: only parameters of a model that "
            "zeroxide.initialize has taken over can be set"
        )
    return sharded


def _settable(param: torch.Tensor) -> ShardedParam:
    sharded = _required(param)
    if sharded.opaque or sharded.dtype not in ORDINARY:
        kind = (
            f"is a frozen {type(param).__name__} of {sharded.dtype}" if sharded.opaque else f"has dtype {sharded.dtype}"
        )
        raise ModelError(
            f"{sharded.name} {kind}, which no fp32 value is rounded to: set it inside "
            "zeroxide.zero.GatheredParameters(params, modifier_rank=0)",
            name=sharded.name,
        )
    return sharded


def _trainable(param: torch.Tensor) -> ShardedParam:
    sharded = _required(param)
    if not sharded.trainable:
        raise ModelError(f"{sharded.name} is frozen: it has no gradient and no optimizer state", name=sharded.name)
    return sharded


def _set_full(param: torch.Tensor, sharded: ShardedParam, part: str, value: torch.Tensor) -> None:
    context = sharded.context
    shape = context.whole.shape(param, sharded.shape)
    _check(sharded, value, shape)
    full = context.whole.part(param, to_host(value, copy=True).view(shape)).view(-1)
    if context.ranks.world > 1:
        context.broadcast(full, 0, sharded.name)
    sharded.write(part, full)


def _set_local(sharded: ShardedParam, part: str, value: torch.Tensor) -> None:
    count = sharded.own()[1]
    _check(sharded, value, sharded.shape if count == sharded.shape.numel() else torch.Size([count]), "this rank's part")
    sharded.write_own(part, to_host(value))


def _check(sharded: ShardedParam, value: torch.Tensor, shape: torch.Size, part: str | None = None) -> None:
    numel = shape.numel()
    if value.numel() != numel:
        raise ModelError(
            f"a value for {sharded.name} has {value.numel()} elements {tuple(value.shape)}: expected {numel}"
            + (f" {tuple(shape)}" if part is None or numel == sharded.shape.numel() else f", {part}"),
            name=sharded.name,
        )

"""What forward computes in: the dtypes of the config as torch has them and as the model has them, autocast, and the
casts of inputs and buffers."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from zeroxide.config import Config, Dtype
from zeroxide.device.placement import autocast
from zeroxide.errors import ModelError

__all__ = [
    "cast_buffers",
    "cast_inputs",
    "check_batch_norms",
    "check_shapes",
    "forward_context",
    "own_dtype",
    "torch_dtype",
]

logger = logging.getLogger("zeroxide")

_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_dtype(name: Dtype) -> torch.dtype:
    """The torch dtype that the config calls `name`."""
    return _DTYPES[name]


def check_shapes(module: nn.Module) -> None:
    """Raises ModelError for a parameter or buffer whose shape torch learns from the first input."""
    for name, each in _named_tensors(module):
        if is_lazy(each):
            raise ModelError(
                f"{name} has no shape yet: a lazy module learns it from its first input; run the model on one batch "
                "before zeroxide.initialize",
                name=name,
            )


def check_batch_norms(module: nn.Module, config: Config) -> None:
    """Raises ModelError for a batch norm whose weights are trained in one dtype and whose statistics are asked for in
    another, which torch does not compute on the CPU."""
    dtype, pattern = torch_dtype(config.precision.dtype), _fp32_pattern(module, config)
    for name, each in module.named_modules():
        if not isinstance(each, _BatchNorm):
            continue
        # Not as attributes: a parametrization computes those, and may change with every look.
        weight, running = each._parameters.get("weight"), each._buffers.get("running_mean")
        if weight is None or running is None:
            continue
        path = f"{name}.running_mean" if name else "running_mean"
        asked = _asked_dtype(path, config, pattern)
        if weight.requires_grad and asked not in (None, dtype):
            raise ModelError(
                f"{name} would have statistics in {_short(asked)} as data_types asks, and weights trained in "
                f"{_short(dtype)}: torch computes no batch norm of both; leave its buffers out, or use torch_autocast",
                name=path,
            )


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def own_dtype(module: nn.Module) -> Dtype:
    """The dtype of the trainable parameters, which is what a model is trained in where no config names another.

    Of a model that is frozen throughout, it is the dtype of most elements, or fp32 where that is none to compute in.
    Raises ModelError where trainable parameters are of several dtypes, or of one that cannot be trained in.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    first: dict[torch.dtype, str] = {}
    sizes: dict[torch.dtype, int] = {}
    frozen: dict[torch.dtype, int] = {}
    for name, param in module.named_parameters():
        counts = sizes if param.requires_grad else frozen
        counts[param.dtype] = counts.get(param.dtype, 0) + getattr(param, "ds_numel", param.numel())
        if param.requires_grad:
            first.setdefault(param.dtype, name)
    if not sizes:
        return names.get(max(frozen, key=lambda dtype: frozen[dtype], default=torch.float32), "fp32")
    ask = 'say what to train in with dtype="fp32" or "bf16", or with "bf16" or "fp16" in the config'
    if len(sizes) > 1:
        listed = ", ".join(f"{_short(dtype)} (first {name})" for dtype, name in first.items())
        raise ModelError(f"trainable parameters are of several dtypes: {listed}; {ask}", name=[*first.values()][1])
    ((dtype, name),) = first.items()
    if dtype not in names:
        raise ModelError(f"{name} is {_short(dtype)}: weights are trained in fp32, bf16 or fp16; {ask}", name=name)
    return names[dtype]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def forward_context(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """What forward on `device` runs under: torch.autocast where the config asks for it, inside any of the caller's.

    Weights are not cached in the low dtype: such copies would stay until the end of forward, also of units that were
    released long before, and casting a weight again gives the same bits.
    """
    if config.precision.autocast is None:
        return nullcontext()
    return autocast(torch_dtype(config.precision.autocast), device)


def cast_inputs(config: Config, tree: Any) -> Any:
    """The arguments of forward, floating-point tensors in them cast to the dtype of the weights if asked for."""
    if not config.precision.cast_inputs:
        return tree
    dtype = torch_dtype(config.precision.dtype)

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return tree_map(cast, tree)


def cast_buffers(module: nn.Module, config: Config) -> None:
    """Leaves every buffer as it is, but for casts of floating-point buffers that somebody asks for.

    Those that the model or the config names for it are fp32 under bf16 and fp16; the others are cast to
    `precision.buffer_dtype` where that is set. Without either, the statistics of a batch norm go to the dtype of its
    weights, which torch asks for, and a line says so. A buffer of several modules stays one.
    """
    pattern = _fp32_pattern(module, config)
    statistics: list[str] = []
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, buffer in owner._buffers.items():
            if buffer is None or buffer.dtype not in _CASTABLE:
                continue
            path = f"{prefix}.{name}" if prefix else name
            dtype = _asked_dtype(path, config, pattern)
            if dtype is None and isinstance(owner, _BatchNorm) and isinstance(owner.weight, torch.Tensor):
                dtype = owner.weight.dtype
                statistics += [path] if dtype is not buffer.dtype else []
            if dtype in (None, buffer.dtype):
                continue
            # The first name decides; the cast tensor counts as seen, so that no second name casts it again.
            _, cast = made.get(id(buffer)) or (buffer, buffer.to(dtype))
            made[id(buffer)] = (buffer, cast)
            made[id(cast)] = (cast, cast)
            owner._buffers[name] = cast
    if statistics:
        logger.warning(
            "statistics of batch norms are cast to the dtype of their weights, as torch needs it: %s%s",
            statistics[0],
            f" and {len(statistics) - 1} more" if len(statistics) > 1 else "",
        )


def _asked_dtype(path: str, config: Config, pattern: re.Pattern[str] | None) -> torch.dtype | None:
    """The dtype that config or model ask for in a buffer of that full name; None for its own."""
    if pattern is not None and pattern.search(path):
        return torch.float32
    return None if config.precision.buffer_dtype is None else torch_dtype(config.precision.buffer_dtype)


_CASTABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _fp32_pattern(module: nn.Module, config: Config) -> re.Pattern[str] | None:
    """What the full names of buffers that are fp32 match, None under fp32.

    Without a list in the config, those of transformers' classes count: `_keep_in_fp32_modules_strict`, and under fp16
    `_keep_in_fp32_modules`, each below the module whose class has it.
    """
    if config.precision.dtype == "fp32":
        return None
    if config.precision.keep_in_fp32 is not None:
        patterns = [_glob(name) for name in config.precision.keep_in_fp32]
    else:
        lists = [
            "_keep_in_fp32_modules_strict",
            *(["_keep_in_fp32_modules"] if config.precision.dtype == "fp16" else []),
        ]
        patterns = [
            (rf"^{re.escape(prefix)}\..*" if prefix else "") + _glob(name)
            for prefix, owner in module.named_modules()
            for each in lists
            for name in getattr(owner, each, None) or ()
        ]
    return re.compile("|".join(sorted(set(patterns)))) if patterns else None


def _glob(name: str) -> str:
    """`*` for any characters; the rest is a regular expression, as transformers has it."""
    return name.replace("*", ".*")

"""`bf16`, `fp16`, `torch_autocast` and `data_types`: what forward, backward and accumulation compute in."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator

from zeroxide.config.fields import Count, Flag, NoEffect, NonNegative, NotBuilt, Section, choice, expecting, whole

__all__ = ["DTYPE_NAMES", "Bf16", "DataTypes", "DtypeName", "Fp16", "TorchAutocast", "dtype_named"]

DtypeName = Annotated[Literal["fp32", "bf16", "fp16"], choice("fp32", "bf16", "fp16")]

DTYPE_NAMES: dict[str, Literal["bf16", "fp16", "fp32"]] = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "fp32": "fp32",
    "float32": "fp32",
}
"""Every name of a dtype, torch's among them, and the one that `Config` has for it."""

LARGEST_SCALE_POWER = 127
"""Of 2, in fp32: the scale is a factor on an fp32 loss."""


def dtype_named(value: object) -> Literal["bf16", "fp16", "fp32"]:
    """The dtype that `value` names. A torch dtype is known by its name, so that this package need not import torch.

    Raises ValueError for anything else.
    """
    name = DTYPE_NAMES.get(str(value).removeprefix("torch."))
    if name is None:
        raise ValueError
    return name


def _low(value: object) -> str:
    name = dtype_named(value.lower() if isinstance(value, str) else value)
    if name == "fp32":
        raise ValueError
    return name


ScalePower = Annotated[
    int,
    Field(ge=0, le=LARGEST_SCALE_POWER),
    BeforeValidator(whole),
    expecting(f"an integer from 0 to {LARGEST_SCALE_POWER}"),
]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), expecting("a finite number above 0")]
LowName = Annotated[Literal["bf16", "fp16"], PlainValidator(_low), expecting('"bfloat16" or "float16"')]


class Bf16(Section):
    """`bf16`: train with bf16 weights, gradients and activations; the optimizer state stays exact."""

    enabled: Flag = False
    check_grad_overflow: Flag | None = None
    immediate_grad_update: Annotated[Flag | None, NoEffect("gradients always land as soon as they arrive")] = None
    bf16_master_weights_and_grads: Annotated[Flag | None, NotBuilt("bf16 master weights")] = None
    bf16_optimizer_states: Annotated[Flag | None, NotBuilt("bf16 optimizer states")] = None


class Fp16(Section):
    """`fp16`: train with fp16 weights, gradients and activations, the loss scaled; the optimizer state stays exact.

    `loss_scale` 0 is a dynamic scale, which starts at 2 to the power of `initial_scale_power`.
    """

    enabled: Flag = False
    auto_cast: Flag | None = None
    loss_scale: NonNegative | None = None
    initial_scale_power: ScalePower | None = None
    loss_scale_window: Count | None = None
    hysteresis: Count | None = None
    consecutive_hysteresis: Flag | None = None
    min_loss_scale: Positive | None = None
    fp16_master_weights_and_grads: Annotated[Flag | None, NotBuilt("fp16 master weights")] = None


class TorchAutocast(Section):
    """`torch_autocast`: fp32 weights, and forward under torch.autocast, which chooses the dtype of each operation."""

    enabled: Flag = False
    dtype: LowName | None = None
    lower_precision_safe_modules: Annotated[
        Any, NotBuilt("gathering and reducing some modules in the dtype of autocast", neutral=([],))
    ] = None


class DataTypes(Section):
    """`data_types`: what gradients are kept in, and what floating-point buffers are cast to.

    `keep_in_fp32_modules` are patterns of buffer names, `*` for any characters, that are fp32 under bf16 and fp16.
    """

    grad_accum_dtype: DtypeName | None = None
    buffer_dtype: DtypeName | None = None
    param_dtype: DtypeName | None = None
    keep_in_fp32_modules: Annotated[list[str], expecting('"auto" or a list of name patterns')] | None = None

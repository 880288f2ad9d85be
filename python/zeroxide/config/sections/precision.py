"""What forward, backward and accumulation compute in, from all the keys that have a say in it.

These are the sections `bf16`, `fp16`, `torch_autocast` and `data_types` and the key `communication_data_type`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from zeroxide.config.check import show
from zeroxide.config.facts import Resolved
from zeroxide.config.fields import (
    Count,
    Flag,
    NoEffect,
    NonNegative,
    NotBuilt,
    Positive,
    Section,
    choice,
    expecting,
    in_any_case,
    whole,
)
from zeroxide.config.given import Given
from zeroxide.config.state_formats import Format, needs_bf16
from zeroxide.errors import ConfigError

if TYPE_CHECKING:
    from zeroxide.config.shortcuts import Shortcuts

__all__ = ["Dtype", "LossScale", "LowDtype", "Precision", "PrecisionKeys", "dtype_named", "resolve"]

Dtype = Literal["fp32", "bf16", "fp16"]
LowDtype = Literal["bf16", "fp16"]
NoEffects = list[tuple[str, str]]

_DYNAMIC_ONLY = ("initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis", "min_loss_scale")

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
_LOW_NAMES = [name for name, dtype in DTYPE_NAMES.items() if dtype != "fp32"]
LowName = Annotated[
    Literal["bf16", "fp16"],
    PlainValidator(_low),
    expecting('"bfloat16" or "float16"'),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": _LOW_NAMES},
                {"type": "string", "pattern": in_any_case(*_LOW_NAMES, *(f"torch.{name}" for name in _LOW_NAMES))},
            ]
        }
    ),
]


class Bf16(Section):
    """`bf16`: train with bf16 weights, gradients and activations; the optimizer state stays exact."""

    enabled: Flag = False
    """Whether weights, gradients and activations are bf16."""
    check_grad_overflow: Flag | None = None
    """Whether a step whose gradients are not finite is left out."""
    immediate_grad_update: Annotated[
        Flag | None, NoEffect("gradients are always accumulated as soon as they arrive")
    ] = None
    bf16_master_weights_and_grads: Annotated[Flag | None, NotBuilt("bf16 master weights")] = None
    bf16_optimizer_states: Annotated[Flag | None, NotBuilt("bf16 optimizer states")] = None


class Fp16(Section):
    """`fp16`: train with fp16 weights, gradients and activations, the loss scaled; the optimizer state stays exact.

    `loss_scale` 0 is a dynamic scale, which starts at 2 to the power of `initial_scale_power`.
    """

    enabled: Flag = False
    """Whether weights, gradients and activations are fp16."""
    auto_cast: Flag | None = None
    """Whether floating-point inputs of the model are cast to fp16."""
    loss_scale: NonNegative | None = None
    """A constant factor on the loss; 0 for one that changes."""
    initial_scale_power: ScalePower | None = None
    """The power of 2 that a changing factor begins with."""
    loss_scale_window: Count | None = None
    """Steps in a row without an overflow after which the factor is doubled."""
    hysteresis: Count | None = None
    """The overflow that halves the factor: those before it only skip their steps."""
    consecutive_hysteresis: Flag | None = None
    """Whether the overflows before it must follow one another."""
    min_loss_scale: Positive | None = None
    """The factor is never halved below this."""
    fp16_master_weights_and_grads: Annotated[Flag | None, NotBuilt("fp16 master weights")] = None


class TorchAutocast(Section):
    """`torch_autocast`: fp32 weights, and forward under torch.autocast, which chooses the dtype of each operation."""

    enabled: Flag = False
    """Whether every forward runs under torch.autocast."""
    dtype: LowName | None = None
    """Its dtype."""
    lower_precision_safe_modules: Annotated[
        Any, NotBuilt("gathering and reducing some modules in the dtype of autocast", neutral=([],))
    ] = None


class DataTypes(Section):
    """`data_types`: what gradients are kept in, and what floating-point buffers are cast to.

    `keep_in_fp32_modules` are patterns of buffer names, `*` for any characters, that are fp32 under bf16 and fp16.
    """

    grad_accum_dtype: DtypeName | None = None
    """What gradients are stored and accumulated in; without it the dtype of the weights."""
    buffer_dtype: DtypeName | None = None
    """What floating-point buffers are cast to; without it each keeps its own."""
    param_dtype: DtypeName | None = None
    """Names the dtype of the weights, which the sections bf16 and fp16 set; without either, fp32 casts them."""
    keep_in_fp32_modules: Annotated[list[str], expecting('"auto" or a list of name patterns')] | None = None
    """Patterns of names of buffers that are fp32 under bf16 and fp16; without it the model's own lists."""


class PrecisionKeys(Section):
    """The keys at the top of the keys."""

    bf16: Bf16 | None = None
    bfloat16: Bf16 | None = None
    fp16: Fp16 | None = None
    torch_autocast: TorchAutocast | None = None
    data_types: DataTypes | None = None
    communication_data_type: DtypeName | None = None
    """What gradients travel in between ranks; without it the dtype of the weights."""


@dataclass(frozen=True, slots=True)
class LossScale:
    """How the factor on the loss is chosen that keeps small fp16 gradients from vanishing.

    A dynamic scale is halved when gradients overflow and doubled after `window` steps without an overflow, as
    `zeroxide.precision.loss_scale` counts them.
    """

    initial: float = 2.0**16
    """The scale of the first step; with `dynamic` false, that of every step."""
    dynamic: bool = True
    window: int = 1000
    """Steps in a row without an overflow after which the scale is doubled."""
    hysteresis: int = 2
    """The overflow that halves the scale: those before it only skip their steps."""
    consecutive_hysteresis: bool = False
    """Whether the overflows before it must follow one another: a good step restores the count."""
    minimum: float = 1.0
    """The scale is never halved below this."""

    def written(self) -> dict[str, Any]:
        """What the section `fp16` says that comes to this, by dotted key."""
        if not self.dynamic:
            return {"fp16.loss_scale": self.initial}
        return {
            "fp16.loss_scale": 0,
            "fp16.initial_scale_power": round(math.log2(self.initial)),
            "fp16.loss_scale_window": self.window,
            "fp16.hysteresis": self.hysteresis,
            "fp16.consecutive_hysteresis": self.consecutive_hysteresis,
            "fp16.min_loss_scale": self.minimum,
        }


@dataclass(frozen=True, kw_only=True)
class Precision(Resolved):
    """The dtypes of a run, the loss scale, and the format of exact weights."""

    key: ClassVar[str] = "precision"

    dtype: Dtype = "fp32"
    """dtype of weights and activations in forward and backward."""
    asked: bool = False
    """Whether the user's words name it; otherwise it is that of the model's weights."""
    autocast: LowDtype | None = None
    """dtype of torch.autocast around every forward; `None` for none. The weights are fp32 then."""
    cast_inputs: bool = False
    """Whether floating-point inputs of the model are cast to `dtype`."""
    loss_scale: LossScale | None = None
    """Set exactly when forward computes in fp16, as `dtype` or under autocast."""
    check_overflow: bool = True
    """Whether a step whose gradients are not finite is left out."""
    format: Format = "fp32"
    """How the optimizer keeps its state: weights as two 16-bit halves or as an fp32 master copy, with fp32 moments; as
    two halves with bf16 moments; or with an 8-bit rest of the weights and 8-bit moments. All but "fp32" need bf16."""
    rounding_seed: int = 0
    """What the random bits are made of that formats round with which do not keep every bit."""
    grad_dtype: Dtype = "fp32"
    """dtype that gradients are stored and accumulated in: that of the weights unless the config says fp32.

    In fp16, a sum over micro-batches can overflow where its terms do not; it is found like any other overflow.
    """
    reduce_dtype: Dtype = "fp32"
    """dtype in which gradients travel between ranks; they are summed in fp32."""
    buffer_dtype: Dtype | None = None
    """dtype that the model's floating-point buffers are cast to; `None` keeps each in its own."""
    keep_in_fp32: tuple[str, ...] | None = None
    """Patterns of names of buffers that are fp32 under bf16 and fp16; `None` takes the model's own lists."""

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`. A dtype that follows from the model's weights is left out."""
        dtype = self.dtype if self.asked else None
        said: dict[str, Any] = {"bf16.enabled": dtype == "bf16", "fp16.enabled": dtype == "fp16"}
        if dtype == "bf16":
            said["bf16.check_grad_overflow"] = self.check_overflow
        if dtype == "fp16" and self.loss_scale is not None:
            said["fp16.auto_cast"] = self.cast_inputs
            said |= self.loss_scale.written()
        said["torch_autocast.enabled"] = self.autocast is not None
        if self.autocast is not None:
            said["torch_autocast.dtype"] = {"bf16": "bfloat16", "fp16": "float16"}[self.autocast]
        return said | {
            "data_types.param_dtype": dtype,
            "data_types.grad_accum_dtype": self.grad_dtype if self.asked else None,
            "data_types.buffer_dtype": self.buffer_dtype,
            "data_types.keep_in_fp32_modules": None if self.keep_in_fp32 is None else list(self.keep_in_fp32),
            "communication_data_type": self.reduce_dtype if self.asked else None,
            "zeroxide.format": self.format if self.asked else None,
            "zeroxide.rounding_seed": self.rounding_seed,
        }


def resolve(
    keys: PrecisionKeys,
    format: Format | None,
    rounding_seed: int,
    own_dtype: Callable[[], Dtype] | None,
    given: Given,
) -> Precision:
    """Settles the dtypes; `format` is the state format asked for, if any, and `rounding_seed` its random bits' seed.

    `own_dtype` tells the dtype of the model's weights, and is asked where the user's words name none. Raises
    ConfigError where sections contradict one another or the shortcut, and what `own_dtype` raises.
    """
    asked = _asked(keys, given.shortcuts)
    own = own_dtype() if asked is None and own_dtype is not None else "fp32"
    precision, name = asked or (own, f"the model's own dtype, {own},")
    kept = keys.data_types.keep_in_fp32_modules if keys.data_types else None
    autocast = _autocast(keys, precision, name, given.no_effect)
    return Precision(
        dtype=precision,
        asked=asked is not None,
        autocast=autocast,
        cast_inputs=precision == "fp16" and keys.fp16 is not None and keys.fp16.auto_cast is True,
        loss_scale=_loss_scale(keys.fp16 or Fp16(), precision, autocast, given.no_effect),
        check_overflow=_check_overflow(keys, precision, given.no_effect),
        format=_format(format, precision),
        rounding_seed=rounding_seed,
        grad_dtype=_grad_dtype(keys, precision),
        reduce_dtype=_reduce_dtype(keys, precision),
        buffer_dtype=keys.data_types.buffer_dtype if keys.data_types else None,
        keep_in_fp32=None if kept is None else tuple(kept),
    )


def _asked(keys: PrecisionKeys, shortcuts: Shortcuts) -> tuple[Dtype, str] | None:
    """The dtype of the weights, and what in the user's words asks for it; None where nothing does.

    A section that is off asks for nothing: without another that is on, weights stay what they are.
    """
    if keys.bf16 is not None and keys.bfloat16 is not None:
        raise ConfigError("bf16 and bfloat16 are two names of one section; keep one of them", path="bfloat16")
    bf16 = "bf16" if keys.bfloat16 is None else "bfloat16"
    sections = {"bf16": (bf16, keys.bf16 or keys.bfloat16), "fp16": ("fp16", keys.fp16)}
    said = {
        dtype: section.enabled
        for dtype, (_, section) in sections.items()
        if section is not None and "enabled" in section.model_fields_set
    }
    if said.get("bf16") and said.get("fp16"):
        raise ConfigError(
            f"{bf16}.enabled and fp16.enabled are both true: weights have one dtype; switch one of them off",
            path="fp16.enabled",
            expected="false",
            got="true",
        )
    wanted = shortcuts.dtype
    for dtype, enabled in said.items():
        if wanted is not None and (wanted == dtype) != enabled:
            key = f"{sections[dtype][0]}.enabled"
            raise ConfigError(
                f"dtype={show(wanted)} contradicts {key} = {show(enabled)} in the config; give only one of them",
                path=key,
            )
    stated = keys.data_types.param_dtype if keys.data_types else None
    asked: tuple[Dtype, str] | None = None
    if wanted is not None:
        asked = wanted, f"dtype={show(wanted)}"
    elif said.get("fp16"):
        asked = "fp16", "fp16.enabled"
    elif said.get("bf16"):
        asked = "bf16", f"{bf16}.enabled"
    elif keys.torch_autocast is not None and keys.torch_autocast.enabled:
        asked = "fp32", "torch_autocast.enabled"
    elif stated == "fp32":
        asked = "fp32", "data_types.param_dtype"
    if stated is not None and stated != (asked or (None, ""))[0]:
        raise ConfigError(
            f"data_types.param_dtype = {show(stated)} "
            + (f"contradicts {asked[1]}" if asked else f"needs {stated}.enabled = true")
            + "; it names the dtype of the weights and does not set it",
            path="data_types.param_dtype",
            expected=show(asked[0]) if asked else None,
            got=show(stated),
        )
    return asked


def _autocast(keys: PrecisionKeys, precision: Dtype, name: str, no_effect: NoEffects) -> LowDtype | None:
    section = keys.torch_autocast
    if section is None or not section.enabled:
        if section is not None and section.dtype is not None:
            no_effect.append(("torch_autocast.dtype", "autocast is off"))
        return None
    if precision != "fp32":
        raise ConfigError(
            f"torch_autocast.enabled keeps fp32 weights and contradicts {name}; switch one of them off",
            path="torch_autocast.enabled",
            expected="false",
            got="true",
        )
    return section.dtype or "bf16"


def _loss_scale(section: Fp16, precision: Dtype, autocast: LowDtype | None, no_effect: NoEffects) -> LossScale | None:
    given = {name: getattr(section, name) for name in Fp16.model_fields if name in section.model_fields_set}
    if precision != "fp16":
        _idle(given, [name for name in given if name != "enabled"], "fp16 is off", no_effect)
        # Forward in fp16 loses small gradients whatever the weights are kept in.
        return LossScale() if autocast == "fp16" else None
    if section.loss_scale:
        _idle(given, _DYNAMIC_ONLY, "fp16.loss_scale is a constant", no_effect)
        return LossScale(initial=section.loss_scale, dynamic=False)
    fallback = LossScale()
    power, minimum = section.initial_scale_power, section.min_loss_scale
    scale = LossScale(
        initial=fallback.initial if power is None else 2.0**power,
        window=section.loss_scale_window or fallback.window,
        hysteresis=section.hysteresis or fallback.hysteresis,
        consecutive_hysteresis=section.consecutive_hysteresis is True,
        minimum=fallback.minimum if minimum is None else minimum,
    )
    if scale.initial < scale.minimum:
        raise ConfigError(
            f"fp16.min_loss_scale = {scale.minimum:g} is above the first scale, 2 to the power of "
            f"fp16.initial_scale_power = {scale.initial:g}; lower it or raise the power",
            path="fp16.min_loss_scale",
            expected=f"at most {scale.initial:g}",
            got=show(scale.minimum),
        )
    return scale


def _idle(given: dict[str, object], names: list[str] | tuple[str, ...], reason: str, no_effect: NoEffects) -> None:
    known = {name for name, _ in no_effect}
    no_effect += [(f"fp16.{name}", reason) for name in names if name in given and f"fp16.{name}" not in known]


def _check_overflow(keys: PrecisionKeys, precision: Dtype, no_effect: NoEffects) -> bool:
    section = keys.bf16 or keys.bfloat16
    wanted = None if section is None else section.check_grad_overflow
    if wanted is None:
        return True
    if precision != "bf16":
        no_effect.append((f"{'bf16' if keys.bf16 else 'bfloat16'}.check_grad_overflow", "bf16 is off"))
        return True
    return wanted


def _format(wanted: Format | None, precision: Dtype) -> Format:
    if wanted is not None and wanted != "fp32" and precision != "bf16":
        raise ConfigError(
            f"zeroxide.format: {needs_bf16(wanted)}, got {precision} training",
            path="zeroxide.format",
            expected='"fp32"',
            got=show(wanted),
        )
    return wanted or ("split" if precision == "bf16" else "fp32")


def _grad_dtype(keys: PrecisionKeys, precision: Dtype) -> Dtype:
    wanted = keys.data_types.grad_accum_dtype if keys.data_types else None
    if wanted is None:
        return precision
    if wanted not in (precision, "fp32"):
        raise ConfigError(
            f"data_types.grad_accum_dtype: {show(wanted)} gradients under {precision} training: not built yet",
            path="data_types.grad_accum_dtype",
            expected='"fp32"' if precision == "fp32" else f'"{precision}" or "fp32"',
            got=show(wanted),
        )
    return wanted


def _reduce_dtype(keys: PrecisionKeys, precision: Dtype) -> Dtype:
    wanted = keys.communication_data_type
    if wanted is not None and wanted not in ("fp32", precision):
        raise ConfigError(
            f"communication_data_type: {show(wanted)} for gradients of {precision} training: not built yet",
            path="communication_data_type",
            expected='"fp32"' if precision == "fp32" else f'"{precision}" or "fp32"',
            got=show(wanted),
        )
    return wanted or precision

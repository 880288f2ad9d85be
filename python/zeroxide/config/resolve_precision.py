"""What forward, backward and accumulation compute in, from the sections that have a say in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from zeroxide.config.check import show
from zeroxide.config.resolved import Dtype, LossScale, LowDtype
from zeroxide.config.schema import Document
from zeroxide.config.schema_precision import Fp16
from zeroxide.config.shortcuts import Shortcuts
from zeroxide.errors import ConfigError

__all__ = ["Precision", "resolve_precision"]

NoEffects = list[tuple[str, str]]

_DYNAMIC_ONLY = ("initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis", "min_loss_scale")


@dataclass(frozen=True, slots=True)
class Precision:
    """The fields of `Config` that are decided here, by the same names."""

    precision: Dtype
    precision_asked: bool
    autocast: LowDtype | None
    cast_inputs: bool
    loss_scale: LossScale | None
    check_overflow: bool
    format: Literal["split", "fp32"]
    grad_dtype: Dtype
    reduce_dtype: Dtype
    buffer_dtype: Dtype | None
    keep_in_fp32: tuple[str, ...] | None


def resolve_precision(
    document: Document,
    shortcuts: Shortcuts,
    format: Literal["split", "fp32"] | None,
    no_effect: NoEffects,
    own_dtype: Callable[[], Dtype] | None,
) -> Precision:
    """Settles the dtypes; `format` is the state format asked for, if any.

    `own_dtype` tells the dtype of the model's weights, and is asked where the user's words name none. Raises
    ConfigError where sections contradict one another or the shortcut, and what `own_dtype` raises.
    """
    asked = _asked(document, shortcuts)
    own = own_dtype() if asked is None and own_dtype is not None else "fp32"
    precision, name = asked or (own, f"the model's own dtype, {own},")
    kept = document.data_types.keep_in_fp32_modules if document.data_types else None
    autocast = _autocast(document, precision, name, no_effect)
    return Precision(
        precision=precision,
        precision_asked=asked is not None,
        autocast=autocast,
        cast_inputs=precision == "fp16" and document.fp16 is not None and document.fp16.auto_cast is True,
        loss_scale=_loss_scale(document.fp16 or Fp16(), precision, autocast, no_effect),
        check_overflow=_check_overflow(document, precision, no_effect),
        format=_format(format, precision),
        grad_dtype=_grad_dtype(document, precision),
        reduce_dtype=_reduce_dtype(document, precision),
        buffer_dtype=document.data_types.buffer_dtype if document.data_types else None,
        keep_in_fp32=None if kept is None else tuple(kept),
    )


def _asked(document: Document, shortcuts: Shortcuts) -> tuple[Dtype, str] | None:
    """The dtype of the weights, and what in the user's words asks for it; None where nothing does.

    A section that is off asks for nothing: without another that is on, weights stay what they are.
    """
    if document.bf16 is not None and document.bfloat16 is not None:
        raise ConfigError("bf16 and bfloat16 are two names of one section; keep one of them", path="bfloat16")
    bf16 = "bf16" if document.bfloat16 is None else "bfloat16"
    sections = {"bf16": (bf16, document.bf16 or document.bfloat16), "fp16": ("fp16", document.fp16)}
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
    stated = document.data_types.param_dtype if document.data_types else None
    asked: tuple[Dtype, str] | None = None
    if wanted is not None:
        asked = wanted, f"dtype={show(wanted)}"
    elif said.get("fp16"):
        asked = "fp16", "fp16.enabled"
    elif said.get("bf16"):
        asked = "bf16", f"{bf16}.enabled"
    elif document.torch_autocast is not None and document.torch_autocast.enabled:
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


def _autocast(document: Document, precision: Dtype, name: str, no_effect: NoEffects) -> LowDtype | None:
    section = document.torch_autocast
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


def _check_overflow(document: Document, precision: Dtype, no_effect: NoEffects) -> bool:
    section = document.bf16 or document.bfloat16
    wanted = None if section is None else section.check_grad_overflow
    if wanted is None:
        return True
    if precision != "bf16":
        no_effect.append((f"{'bf16' if document.bf16 else 'bfloat16'}.check_grad_overflow", "bf16 is off"))
        return True
    return wanted


def _format(wanted: Literal["split", "fp32"] | None, precision: Dtype) -> Literal["split", "fp32"]:
    if wanted == "split" and precision != "bf16":
        raise ConfigError(
            'zeroxide.format: "split" keeps a weight as two bf16 halves and needs bf16.enabled, '
            f"got {precision} training",
            path="zeroxide.format",
            expected='"fp32"',
            got='"split"',
        )
    return wanted or ("split" if precision == "bf16" else "fp32")


def _grad_dtype(document: Document, precision: Dtype) -> Dtype:
    wanted = document.data_types.grad_accum_dtype if document.data_types else None
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


def _reduce_dtype(document: Document, precision: Dtype) -> Dtype:
    wanted = document.communication_data_type
    if wanted is not None and wanted not in ("fp32", precision):
        raise ConfigError(
            f"communication_data_type: {show(wanted)} for gradients of {precision} training: not built yet",
            path="communication_data_type",
            expected='"fp32"' if precision == "fp32" else f'"{precision}" or "fp32"',
            got=show(wanted),
        )
    return wanted or precision

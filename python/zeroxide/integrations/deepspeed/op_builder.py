"""`deepspeed.ops.op_builder`: what scripts ask before they use an operator.

Nothing is compiled: what zeroxide has is in its wheel, and what it has not is said by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn

from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from zeroxide.errors import ModelError
from zeroxide.integrations.deepspeed.aio import AsyncIO

__all__ = ["ALL_OPS", "BUILDERS", "COMPATIBLE", "OpBuilder", "op_report"]


class _NoFunction(ModelError, AttributeError):
    """A function that zeroxide has not: who asks whether it is there hears that it is not."""


class _InEngine:
    """Functions of DeepSpeed's extension that only its own classes call."""

    def __init__(self, name: str, instead: str) -> None:
        self._name, self._instead = name, instead

    def __getattr__(self, function: str) -> NoReturn:
        if function.startswith("__"):
            raise AttributeError(function)
        raise _NoFunction(
            f"{self._name}.{function}: zeroxide has no such function, since its optimizers are not called so: use "
            f"{self._instead}"
        )


def _flattening() -> SimpleNamespace:
    return SimpleNamespace(flatten=_flatten_dense_tensors, unflatten=_unflatten_dense_tensors)


class OpBuilder:
    """One operator under DeepSpeed's name."""

    BUILD_VAR: ClassVar[str] = "DS_BUILD_OPS"
    """Read by DeepSpeed when it is installed; zeroxide builds nothing."""
    NAME: ClassVar[str] = ""
    makes: ClassVar[tuple[Callable[[], Any], ...]] = ()
    """What makes the operator, if zeroxide has it."""

    def __init__(self, name: str | None = None) -> None:
        self.name = self.NAME if name is None else name

    def absolute_name(self) -> str:
        """The operator's place under DeepSpeed."""
        return f"deepspeed.ops.{self.name}_op"

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether zeroxide has the operator."""
        return bool(self.makes)

    def load(self, verbose: bool = True) -> Any:
        """The operator, at once. Raises ModelError where zeroxide has none of that name."""
        for make in self.makes:
            return make()
        raise ModelError(f"the operator {self.name} is not built in zeroxide", name=self.name)


def _builder(class_name: str, name: str, *makes: Callable[[], Any]) -> type[OpBuilder]:
    return type(class_name, (OpBuilder,), {"NAME": name, "makes": makes, "__module__": __name__})


def _engine_part(name: str, instead: str) -> Callable[[], Any]:
    return lambda: _InEngine(name, instead)


_HAS: tuple[tuple[str, str, Callable[[], Any]], ...] = (
    ("AsyncIOBuilder", "async_io", AsyncIO),
    ("CPUAdagradBuilder", "cpu_adagrad", _engine_part("cpu_adagrad", "ops.adagrad.DeepSpeedCPUAdagrad")),
    ("CPUAdamBuilder", "cpu_adam", _engine_part("cpu_adam", "ops.adam.DeepSpeedCPUAdam")),
    ("CPULionBuilder", "cpu_lion", _engine_part("cpu_lion", "ops.lion.DeepSpeedCPULion")),
    ("FusedAdamBuilder", "fused_adam", _engine_part("fused_adam", "ops.adam.FusedAdam")),
    ("FusedLionBuilder", "fused_lion", _engine_part("fused_lion", "ops.lion.FusedLion")),
    ("UtilsBuilder", "utils", _flattening),
)
_LACKS = {
    "DeepCompileBuilder": "dc",
    "EvoformerAttnBuilder": "evoformer_attn",
    "FPQuantizerBuilder": "fp_quantizer",
    "FusedLambBuilder": "fused_lamb",
    "GDSBuilder": "gds",
    "InferenceBuilder": "transformer_inference",
    "InferenceCoreBuilder": "inference_core_ops",
    "InferenceCutlassBuilder": "cutlass_ops",
    "QuantizerBuilder": "quantizer",
    "RaggedOpsBuilder": "ragged_device_ops",
    "RaggedUtilsBuilder": "ragged_ops",
    "RandomLTDBuilder": "random_ltd",
    "SpatialInferenceBuilder": "spatial_inference",
    "StochasticTransformerBuilder": "stochastic_transformer",
    "TransformerBuilder": "transformer",
}
"""Operators of DeepSpeed 0.19.8 that zeroxide has not."""

BUILDERS: dict[str, type[OpBuilder]] = {
    **{each: _builder(each, name, make) for each, name, make in _HAS},
    **{each: _builder(each, name) for each, name in _LACKS.items()},
}
"""By DeepSpeed's name of the class."""

ALL_OPS = {builder.NAME: builder() for builder in sorted(BUILDERS.values(), key=lambda each: each.NAME)}
"""By DeepSpeed's name of the operator."""


COMPATIBLE = {
    **{name: builder.is_compatible() for name, builder in ALL_OPS.items()},
    "deepspeed_not_implemented": False,
}
"""Which of DeepSpeed's operators zeroxide has."""


def __getattr__(name: str) -> type[OpBuilder]:
    if name in BUILDERS:
        return BUILDERS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


def op_report(verbose: bool = True) -> None:
    """Prints each operator and whether zeroxide has it."""
    width = max(map(len, ALL_OPS))
    lines = ["Operators of DeepSpeed 0.19.8 (zeroxide has its own in the wheel, and compiles none of them):"]
    lines += [f"  {name:<{width}}  {'in zeroxide' if COMPATIBLE[name] else 'not built'}" for name in ALL_OPS]
    sys.stdout.write("\n".join(lines) + "\n")

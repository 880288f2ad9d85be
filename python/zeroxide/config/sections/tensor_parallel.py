"""`tensor_parallel`: how the matrices of a model are cut over ranks; on how many says `zeroxide.mesh.tp` as well."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, PlainValidator, WithJsonSchema

from zeroxide.config.facts import Resolved
from zeroxide.config.fields import Count, Flag, NoEffect, NotBuilt, Section, WholeNumber, choice, expecting
from zeroxide.config.given import Given
from zeroxide.config.sections.mesh import MeshSection
from zeroxide.errors import ConfigError

__all__ = ["TPLayerSpec", "TensorParallel", "TensorParallelSection", "resolve", "with_tensor_ranks"]

_SECTION = "tensor_parallel"
Preset = Literal["gpt2", "llama", "mistral", "mt5", "qwen2", "t5"]
PRESETS: tuple[str, ...] = get_args(Preset)


@dataclass(frozen=True)
class TPLayerSpec:
    """A rule for the weights whose names match; DeepSpeed's (module_inject/autotp_config.py:28 of 0.19.8).

    patterns: regular expressions, matched from the beginning of a weight's name ("model.layers.0.mlp.up_proj.weight").
    partition_type: "column" cuts what a layer gives, or an embedding's features; "row" what it takes, or an embedding's
        rows; "skip" nothing.
    shape: of a weight in which several are fused, `(n, -1)` for n equal ones or `((a, b, c), -1)` for ones of these
        sizes, along the dimension that is cut.
    partition_dim: the dimension of the weight that is cut; it follows from the layer and may be left out.
    model_types: `config.model_type` of the models for which it holds; all if None.
    gather_output: of a column, whether every rank is given all of the output.
    grad_allreduce: of skip, whether the weight's gradients are summed over ranks, each of which uses it on its part.
    """

    patterns: Sequence[str]
    partition_type: str = "column"
    shape: tuple[Any, ...] | None = None
    partition_dim: int | None = None
    model_types: Sequence[str] | None = None
    gather_output: bool = False
    grad_allreduce: bool = False

    def holds_for(self, name: str, model_type: str | None) -> bool:
        """Whether it is a rule for the weight of that name."""
        if self.model_types is not None and model_type not in self.model_types:
            return False
        return any(re.match(pattern, name) for pattern in self.patterns)

    @property
    def blocks(self) -> int | tuple[int, ...]:
        """How many equal weights are fused along the dimension that is cut, or the size of each."""
        found: int | tuple[int, ...] = 1 if self.shape is None else self.shape[0]
        return found


def _patterns(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(each, str) and each for each in value):
        raise ValueError
    for each in value:
        try:
            re.compile(each)
        except re.error:
            raise ValueError from None
    return tuple(value)


def _shape(value: Any) -> tuple[Any, ...]:
    match value:
        case [int(count), -1] if count >= 1 and not isinstance(count, bool):
            return count, -1
        case [[*sizes], -1] if sizes and all(type(each) is int and each >= 1 for each in sizes):
            return tuple(sizes), -1
    raise ValueError


_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_SIZES = {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]}
Patterns = Annotated[
    tuple[str, ...], PlainValidator(_patterns), expecting("a list of regular expressions"), WithJsonSchema(_TEXTS)
]
Shape = Annotated[
    tuple[Any, ...],
    PlainValidator(_shape),
    expecting("[n, -1] for n equal weights, or [[a, b, c], -1] for their sizes"),
    WithJsonSchema({"type": "array", "items": _SIZES, "minItems": 2, "maxItems": 2}),
]


class LayerSpec(Section):
    """An entry of `tensor_parallel.partition_config.layer_specs`: see `TPLayerSpec`."""

    patterns: Patterns
    """Regular expressions, matched from the beginning of a weight's name."""
    partition_type: Annotated[Literal["column", "row", "skip"], choice("column", "row", "skip")] = "column"
    """What is cut: "column" what a layer gives, "row" what it takes, "skip" nothing."""
    shape: Shape | None = None
    """Of fused weights, [n, -1] for n equal ones or [[a, b, c], -1] for their sizes."""
    partition_dim: Annotated[int, Field(ge=0, le=1), expecting("0 or 1")] | None = None
    """The dimension that is cut; it follows from the layer and may be left out."""
    model_types: Patterns | None = None
    """`model_type` of the models for which it holds; without it, all."""
    gather_output: Flag = False
    """Of "column": whether every rank is given all of the output."""
    grad_allreduce: Flag = False
    """Of "skip": whether each rank has a part of the weight's gradients, which are summed."""


class PartitionConfig(Section):
    """`tensor_parallel.partition_config`: rules of the user's own."""

    use_default_specs: Flag = True
    """Whether the model's own plan, or the preset for its type, holds for what `layer_specs` say nothing of."""
    layer_specs: list[LayerSpec] | None = None
    """Rules for weights by their names; the first that matches holds."""


class TensorGroupKeys(Section):
    """`tensor_parallel.tp`."""

    tp_size: Count | None = None
    """As `autotp_size`."""
    enabled: Annotated[Flag | None, NoEffect("the number of ranks says it")] = None
    tp_grain_size: Annotated[Any, NoEffect("dimensions are cut as evenly as they go, and heads stay whole")] = None
    mpu: Annotated[Any, NotBuilt("groups of an mpu; the mesh makes them")] = None
    tp_group: Annotated[Any, NotBuilt("a process group of one's own; the mesh makes it")] = None


class TensorParallelSection(Section):
    """`tensor_parallel`."""

    autotp_size: WholeNumber | None = None
    """Ranks that share every matrix, as `zeroxide.mesh.tp`; 0 and 1 are none."""
    enabled: Annotated[Flag | None, NoEffect("autotp_size says it")] = None
    vocab_parallel_lm_head: Flag | None = None
    """Whether the loss is computed of each rank's part of the logits, which are then never put together."""
    preset_model: Annotated[Preset, choice(*PRESETS)] | None = None
    """Whose rules are taken instead of the model's own."""
    partition_config: PartitionConfig | None = None
    tp: TensorGroupKeys | None = None
    dtype: Annotated[Any, NoEffect("bf16, fp16 and data_types say what the model trains in")] = None
    tp_overlap_comm: Annotated[Any, NoEffect("a sum over tensor ranks is needed by the very next operation")] = None
    vocab_parallel_ce_backend: Annotated[Any, NotBuilt("Liger's kernels for the loss", neutral=("torch",))] = None


@dataclass(frozen=True)
class TensorParallel(Resolved):
    """How a model is cut over the ranks of `mesh.tp`."""

    key: ClassVar[str] = _SECTION

    vocab_parallel_lm_head: bool = False
    """Whether logits stay cut, and the loss is computed of their parts."""
    preset_model: str | None = None
    """Whose rules are taken; `None` is the model's own plan, or the preset for its type."""
    use_default_specs: bool = True
    """Whether those hold for what `layer_specs` say nothing of."""
    layer_specs: tuple[TPLayerSpec, ...] = ()
    """Rules that come first."""

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`. Nothing where nothing is said: without ranks to share matrices it has no effect."""
        if self == TensorParallel():
            return {}
        specs = [_said(each) for each in self.layer_specs]
        return {
            f"{self.key}.vocab_parallel_lm_head": self.vocab_parallel_lm_head,
            f"{self.key}.preset_model": self.preset_model,
            f"{self.key}.partition_config.use_default_specs": self.use_default_specs,
            f"{self.key}.partition_config.layer_specs": specs or None,
        }


def _said(spec: TPLayerSpec) -> dict[str, Any]:
    said = {name: value for name, value in dataclasses.asdict(spec).items() if value is not None}
    return {name: value for name, value in said.items() if value is not False}


def tensor_ranks(section: TensorParallelSection | None) -> int | None:
    """How many ranks the section asks for; None where it does not say. Raises ConfigError where it says two numbers."""
    if section is None:
        return None
    theirs = None if section.tp is None else section.tp.tp_size
    own = None if section.autotp_size is None else max(1, section.autotp_size)
    if None not in (own, theirs) and own != theirs:
        raise ConfigError(
            f"{_SECTION}.autotp_size = {section.autotp_size} contradicts {_SECTION}.tp.tp_size = {theirs}",
            path=f"{_SECTION}.autotp_size",
        )
    return own if theirs is None else theirs


def with_tensor_ranks(section: TensorParallelSection | None, mesh: MeshSection | None) -> MeshSection | None:
    """The section of the mesh, with the ranks that `section` asks for. Raises ConfigError where that says another."""
    asked = tensor_ranks(section)
    if asked is None:
        return mesh
    if mesh is not None and mesh.tp not in (None, asked):
        raise ConfigError(
            f"{_SECTION}.autotp_size = {asked} contradicts zeroxide.mesh.tp = {mesh.tp}: give one of them",
            path=f"{_SECTION}.autotp_size",
        )
    if asked == 1:
        return mesh
    return (mesh or MeshSection()).model_copy(update={"tp": asked})


def resolve(section: TensorParallelSection | None, mesh: MeshSection | None, given: Given) -> TensorParallel:
    """What the section comes to, on the ranks of `mesh`; its keys are listed as without effect where there are none."""
    if section is None:
        return TensorParallel()
    if mesh is None or (mesh.tp or 1) == 1:
        said = ("vocab_parallel_lm_head", "preset_model", "partition_config")
        given.no_effect.extend(
            (f"{_SECTION}.{name}", "autotp_size is 1") for name in said if getattr(section, name) is not None
        )
        return TensorParallel()
    rules = section.partition_config or PartitionConfig()
    specs = tuple(
        TPLayerSpec(**{name: getattr(each, name) for name in LayerSpec.model_fields})
        for each in rules.layer_specs or ()
    )
    for number, each in enumerate(specs):
        path = f"{_SECTION}.partition_config.layer_specs.{number}"
        if each.gather_output and each.partition_type != "column":
            raise ConfigError(f'{path}.gather_output is of "column": others have all of their output', path=path)
        if each.grad_allreduce and each.partition_type != "skip":
            raise ConfigError(f'{path}.grad_allreduce is of "skip": a part has a gradient of its own', path=path)
    return TensorParallel(
        vocab_parallel_lm_head=bool(section.vocab_parallel_lm_head),
        preset_model=section.preset_model,
        use_default_specs=rules.use_default_specs,
        layer_specs=specs,
    )

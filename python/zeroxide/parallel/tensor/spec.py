"""Which layers of a model are cut, and how, as users and presets say it: `TPLayerSpec`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from zeroxide.errors import ConfigError

__all__ = ["LayerRule", "TPLayerSpec"]

Kind = Literal["column", "row", "skip"]


@dataclass(frozen=True)
class LayerRule:
    """How one module is cut.

    column: each rank computes a part of the output, or of an embedding's features.
    row: each rank takes a part of the input, or has a part of an embedding's rows, and the results are summed.
    skip: it is the same on all ranks.
    """

    kind: Kind
    blocks: int | tuple[int, ...] = 1
    """How many equal tensors are fused along the dimension that is cut, or the size of each."""
    gather_output: bool = False
    """Of a column: whether all ranks are given all of the output."""
    split_input: bool = False
    """Of a row: whether the input is the same on all ranks, and a rank takes its part of it."""
    grad_allreduce: bool = False
    """Of skip: whether each rank computes a part of the gradients, which are summed."""
    origin: str = ""
    """What says so, for messages."""


@dataclass(frozen=True)
class TPLayerSpec:
    """A rule for the weights whose names match; DeepSpeed's (module_inject/autotp_config.py:28 of 0.19.8).

    patterns: regular expressions, matched from the beginning of a weight's name ("model.layers.0.mlp.up_proj.weight").
    partition_type: "column", "row" or "skip", see `LayerRule`.
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

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], path: str) -> TPLayerSpec:
        """One entry of `layer_specs`. Raises ConfigError for what is no rule."""
        known = {"patterns", "partition_type", "shape", "partition_dim", "model_types", "gather_output"}
        for name in given:
            if name not in known | {"grad_allreduce"}:
                raise ConfigError(f"{path}.{name}: unknown key; a layer spec has {', '.join(sorted(known))}", path=path)
        values = {name: value for name, value in given.items() if value is not None}
        if isinstance(values.get("shape"), list):
            values["shape"] = _tuples(values["shape"])
        spec = cls(**{"patterns": (), **values})
        spec.check(path)
        return spec

    def check(self, path: str = "TPLayerSpec") -> None:
        """Raises ConfigError for what is no rule."""
        if isinstance(self.patterns, str) or not self.patterns or not all(isinstance(one, str) for one in self.patterns):
            raise ConfigError(f"{path}.patterns: expected a list of regular expressions, got {self.patterns!r}", path=path)
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{path}.patterns: {pattern!r} is no regular expression: {error}", path=path) from None
        kind = getattr(self.partition_type, "value", self.partition_type)
        if kind not in ("column", "row", "skip"):
            raise ConfigError(f'{path}.partition_type: expected "column", "row" or "skip", got {kind!r}', path=path)
        if self.gather_output and kind != "column":
            raise ConfigError(f'{path}.gather_output is of "column": a "{kind}" has all of its output', path=path)
        if self.grad_allreduce and kind != "skip":
            raise ConfigError(
                f'{path}.grad_allreduce is of "skip": each rank of a "{kind}" has a weight of its own', path=path
            )
        self._blocks(path)

    def _blocks(self, path: str) -> int | tuple[int, ...]:
        if self.shape is None:
            return 1
        match self.shape:
            case (int(count), -1) if count >= 1:
                return count
            case (tuple(sizes), -1) if sizes and all(isinstance(each, int) and each >= 1 for each in sizes):
                return sizes
        raise ConfigError(
            f"{path}.shape: expected (n, -1) for n equal weights or ((a, b, c), -1) for their sizes, got {self.shape!r}",
            path=path,
        )

    def holds_for(self, name: str, model_type: str | None) -> bool:
        """Whether it is a rule for the weight of that name."""
        if self.model_types is not None and model_type not in self.model_types:
            return False
        return any(re.match(pattern, name) for pattern in self.patterns)

    def rule(self, origin: str) -> LayerRule:
        """What it comes to."""
        kind: Kind = getattr(self.partition_type, "value", self.partition_type)
        return LayerRule(
            kind,
            self._blocks(origin),
            gather_output=self.gather_output,
            grad_allreduce=self.grad_allreduce,
            origin=origin,
        )


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list | tuple) else value

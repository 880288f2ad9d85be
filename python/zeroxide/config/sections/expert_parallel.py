"""`expert_parallel`: experts of Hugging Face's models spread over ranks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from zeroxide.config.facts import Resolved
from zeroxide.config.fields import Count, Flag, NoEffect, NotBuilt, Section, Text
from zeroxide.errors import ConfigError

__all__ = ["ExpertParallel", "ExpertParallelSection", "resolve"]

_ROUTER = "routers other than the model's own"


class ExpertParallelSection(Section):
    """`expert_parallel`."""

    enabled: Flag = False
    """Whether fused experts of the model are computed by zeroxide, and spread over `autoep_size` ranks."""
    autoep_size: Count = 1
    """Ranks over which they are spread."""
    preset_model: Text | None = None
    """The model_type that the model must have."""
    moe_layer_pattern: Text | None = None
    """A regular expression that is found in the names of the layers that are meant; all without it."""
    expert_pattern: Text | None = None
    """A regular expression for the name that experts have in their layer."""
    router_pattern: Annotated[Any, NoEffect("the model's own routers stay as they are")] = None
    shared_experts_pattern: Annotated[Any, NoEffect("shared experts stay as they are, on every rank")] = None
    use_grouped_mm: Annotated[Any, NoEffect("experts always run one after the other over contiguous tokens")] = None
    expert_w1: Annotated[Any, NotBuilt("experts whose weights have other names", neutral=("gate_up_proj",))] = None
    expert_w2: Annotated[Any, NotBuilt("experts whose weights have other names", neutral=("down_proj",))] = None
    expert_w3: Annotated[Any, NotBuilt("experts that are not fused")] = None
    top_k: Annotated[Any, NotBuilt(_ROUTER)] = None
    score_func: Annotated[Any, NotBuilt(_ROUTER)] = None
    score_apply: Annotated[Any, NotBuilt(_ROUTER)] = None
    route_norm: Annotated[Any, NotBuilt(_ROUTER)] = None
    route_scale: Annotated[Any, NotBuilt(_ROUTER)] = None
    routed_scaling_factor: Annotated[Any, NotBuilt(_ROUTER)] = None
    num_expert_groups: Annotated[Any, NotBuilt(_ROUTER)] = None
    num_limited_groups: Annotated[Any, NotBuilt(_ROUTER)] = None
    load_balance_coeff: Annotated[Any, NotBuilt(_ROUTER)] = None
    comm_backend: Annotated[Any, NotBuilt("DeepEP", neutral=("comm",))] = None
    expert_tensor_parallel_size: Annotated[Any, NotBuilt("experts in parts", neutral=(1,))] = None


@dataclass(frozen=True)
class ExpertParallel(Resolved):
    """What becomes of the experts of a Hugging Face model."""

    key: ClassVar[str] = "expert_parallel"

    enabled: bool = False
    autoep_size: int = 1
    preset_model: str | None = None
    moe_layer_pattern: str | None = None
    expert_pattern: str | None = None

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`."""
        names = ("enabled", "autoep_size", "preset_model", "moe_layer_pattern", "expert_pattern")
        return {f"{self.key}.{name}": getattr(self, name) for name in names} if self.enabled else {}


def resolve(section: ExpertParallelSection | None) -> ExpertParallel:
    """What `section` comes to. Raises ConfigError for patterns that are no regular expressions."""
    if section is None or not section.enabled:
        return ExpertParallel()
    for name in ("moe_layer_pattern", "expert_pattern"):
        pattern = getattr(section, name)
        try:
            re.compile(pattern or "")
        except re.error as error:
            path = f"expert_parallel.{name}"
            raise ConfigError(
                f"{path}: expected a regular expression, got {pattern!r}: {error}",
                path=path,
                expected="a regular expression",
                got=repr(pattern),
            ) from None
    return ExpertParallel(
        enabled=True,
        autoep_size=section.autoep_size,
        preset_model=section.preset_model,
        moe_layer_pattern=section.moe_layer_pattern,
        expert_pattern=section.expert_pattern,
    )

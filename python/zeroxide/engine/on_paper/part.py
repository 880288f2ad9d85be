"""The part of a model that one rank has, from shapes alone: cut as the engine cuts it, by the same code."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from zeroxide.config import Config, Mesh
from zeroxide.engine.on_paper.stand_ins import Counted, PaperExchange, PaperTensorGroup, absent, balance, share_on_paper
from zeroxide.moe.spread import spread_on_paper
from zeroxide.optim.groups import groups_for, state_plans
from zeroxide.parallel.pipe.cut import CutModel, cut_for
from zeroxide.parallel.pipe.row import Row
from zeroxide.parallel.pipe.stages import units_of
from zeroxide.parallel.tensor import Sharding, find_rules, shard_model, shard_of
from zeroxide.parallel.tensor.shard import keep_logits_apart
from zeroxide.plan.plan import Plan, make_plan
from zeroxide.zero.leaf import mark_leaf_modules, set_z3_leaf_module

__all__ = ["Carried", "PaperPart", "Tie", "axes_of"]


@dataclass
class Carried:
    """What a part of a model sends while it computes, by kind."""

    tokens: Counted = field(default_factory=Counted)
    """Between experts, there and back, forward and backward."""
    counts: Counted = field(default_factory=Counted)
    """How many tokens go to whom."""
    sequences: Counted = field(default_factory=Counted)
    """Heads for tokens."""

    def taken(self) -> Carried:
        """What there is, which is forgotten here."""
        return Carried(self.tokens.taken(), self.counts.taken(), self.sequences.taken())


@dataclass(frozen=True)
class Tie:
    """A parameter that several stages have. Numbers are of elements."""

    numel: int
    """Of this rank's part."""
    widest: int
    """Of the largest part of a tensor-parallel rank."""
    full: int
    ranks: tuple[int, ...]
    """Of the pipeline."""
    first: bool
    """Whether this rank sums the gradients of all."""

    @classmethod
    def of(cls, param: nn.Parameter, ranks: tuple[int, ...], rank: int) -> Tie:
        """What rank `rank` of the pipeline has."""
        shard = shard_of(param)
        widest = param.numel() if shard is None else max(part.numel for part in shard.parts())
        full = param.numel() if shard is None else math.prod(shard.shape)
        return cls(param.numel(), widest, full, ranks, rank == ranks[0])


def axes_of(config: Config, world: int) -> Mesh:
    """The axes of `world` ranks."""
    if config.mesh is not None:
        return config.mesh
    return Mesh(dp_shard=world) if config.zero.stage > 0 else Mesh(dp_replicate=world)


class PaperPart:
    """The part of `model`, on the meta device, that rank `stage_id` of a pipeline has; the first along other axes.

    row: of the model, where there are stages. `made` undoes what transformers was told. Raises ModelError and
    ConfigError for a model that cannot be cut so.
    """

    def __init__(
        self, model: nn.Module, config: Config, world: int, stage_id: int, row: Row | None, made: ExitStack
    ) -> None:
        self.module, self.config = model, config
        self.axes = axes_of(config, world)
        self.carried = Carried()
        self.stages: CutModel | None = None
        if self.axes.pp > 1:
            assert row is not None, "stages are cut by it"
            pipeline = config.pipeline
            assert pipeline is not None, "there are stages"
            self.stages = cut_for(
                model,
                self.axes.pp,
                stage_id,
                partition_method=pipeline.partition or "parameters",
                schedule=pipeline.schedule or "1f1b",
                stages_per_rank=pipeline.stages_per_rank or 1,
                row=row,
            )
        self.row = row
        if self.axes.sp > 1:
            made.callback(share_on_paper(model, self.axes.sp, self.carried.sequences).unregister)
        self._experts = self._spread()
        self.group = self._cut()

    @property
    def own_stages(self) -> tuple[int, ...]:
        """Of the pipeline, those of this rank."""
        return (0,) if self.stages is None else self.stages.own_stages

    def _spread(self) -> frozenset[int]:
        if not self.config.expert_parallel.enabled:
            return frozenset()
        carried = self.carried
        modules, params = spread_on_paper(
            self.module,
            self.config,
            self.axes.ep,
            lambda name: PaperExchange(self.axes.ep, name, carried.tokens, carried.counts),
        )
        for each in modules:
            set_z3_leaf_module(each, True)
            weight = next(each.parameters())
            balance(each, weight.shape[0] * self.axes.ep)
        return params

    def _cut(self) -> PaperTensorGroup | None:
        if self.axes.tp == 1:
            return None
        group, asked = PaperTensorGroup(self.axes.tp), self.config.tensor_parallel
        rules = find_rules(self.module, asked.layer_specs, asked.preset_model, defaults=asked.use_default_specs)
        shard_model(self.module, rules, Sharding(group))
        if asked.vocab_parallel_lm_head:
            keep_logits_apart(self.module, group)
        # Rehearsing leaves parameters without this.
        _ = self.ties
        return group

    @property
    def is_last(self) -> bool:
        """Whether this rank comes to the loss."""
        return self.stages is None or self.stages.total_stages - 1 in self.own_stages

    @cached_property
    def plan(self) -> Plan:
        """The engine's plan of this part, in host memory and without a budget.

        Raises ModelError, ConfigError for what cannot be trained.
        """
        config, axes = self.config, self.axes
        elsewhere: frozenset[int] = frozenset() if self.stages is None else self.stages.elsewhere()
        mark_leaf_modules(self.module, config)
        groups = groups_for(self.module, config, None, None, elsewhere)
        return make_plan(
            self.module,
            config,
            threads=1,
            resident=0,
            ranks=absent(axes.dp_replicate * axes.dp_shard * axes.sp),
            states=state_plans(groups, config),
            experts=self._experts,
        )

    def units_of(self, stage: int) -> list[int]:
        """The units of `plan` that a stage uses; none stands for all."""
        return [] if self.stages is None else units_of(self.stages, self.plan, stage)

    @cached_property
    def ties(self) -> list[Tie]:
        """The trainable parameters that this rank and other stages have."""
        if self.stages is None:
            return []
        found = dict(self.module.named_parameters(remove_duplicate=False))
        mine = [(found[name], ranks) for name, ranks in self.stages.ties().items() if self.stages.stage_id in ranks]
        return [Tie.of(param, ranks, self.stages.stage_id) for param, ranks in mine if param.requires_grad]

    def signature(self) -> tuple[Any, ...]:
        """Equal where two ranks compute the same: which stages, and shapes by block."""
        if self.stages is None or self.row is None:
            return ()
        found: list[Any] = []
        for stage in self.own_stages:
            blocks = [
                tuple((name, tuple(param.shape)) for name, param in self.row.block(self.module, at).named_parameters())
                for at in self.stages.blocks_of(stage)
            ]
            found.append((stage == 0, stage == self.stages.total_stages - 1, tuple(blocks)))
        return tuple(found)

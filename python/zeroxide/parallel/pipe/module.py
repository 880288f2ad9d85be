"""A model as a row of layers, of which a rank builds those of its own stages."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from zeroxide.distributed import read_environment
from zeroxide.errors import ConfigError, DataError, ModelError, RanksError
from zeroxide.parallel.pipe.layers import LayerSpec, TiedLayerSpec
from zeroxide.parallel.pipe.partition import bounds_of, cut_by
from zeroxide.parallel.pipe.profile import measure_layers
from zeroxide.parallel.pipe.schedule import check_schedule, rank_of_stage, stages_of
from zeroxide.parallel.pipe.stages import PipelineStages
from zeroxide.parallel.pipe.topology import PipeDataParallelTopology, ProcessTopology

__all__ = ["PipelineModule", "this_rank"]

TIED = "tied_modules"
"""The attribute with the modules of `TiedLayerSpec`s, by key, as DeepSpeed calls it."""


def this_rank() -> tuple[int, int]:
    """This rank and how many there are: of the default process group, or as the launcher says."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    told = read_environment(os.environ)
    return told.rank, told.world


class PipelineModule(PipelineStages, nn.Module):
    """A model whose layers follow one another: each takes what the one before gives. DeepSpeed's signature.

    layers: an `nn.Sequential`, or a sequence of modules, `LayerSpec`s and plain callables. A layer takes and gives one
        value: a tensor, or tensors and plain values in tuples, lists and dicts. Only the layers of this rank's stages
        are built, and only they are kept.
    num_stages: ranks of the pipeline; or `topology`, whose axis "pipe" says it.
    loss_fn: called as `loss_fn(outputs, labels)` on the last stage. Without one, the last layer gives the loss.
    seed_layers: whether layer `i` is built after `seed_fn(base_seed + i)`, so that its weights do not depend on the
        number of stages; `seed_fn` is torch.manual_seed if None.
    partition_method: "parameters", "uniform", "type:REGEX" for the classes that count, or "profile" for measured time,
        which needs `profile_input`.
    activation_checkpoint_interval: layers that are recomputed together in backward, by `activation_checkpoint_func`; 0
        for none. `checkpointable_layers`: names of the classes that may be; those with parameters if None.
    dynamic_shape: has no effect: shapes may always differ from one micro-batch to the next.
    schedule, stages_per_rank: one of `SCHEDULES` and the stages that it gives each rank, see docs/pipeline.md.
    profile_input: what the first layer takes, for "profile".

    A parameter is named by the layer's number in the whole row ("3.weight", as in an `nn.Sequential` of all layers),
    those of `TiedLayerSpec`s "tied_modules.KEY.weight". Raises ModelError, ConfigError and RanksError, each in one
    line.
    """

    def __init__(
        self,
        layers: nn.Sequential | Sequence[Any],
        num_stages: int | None = None,
        topology: ProcessTopology | None = None,
        loss_fn: Callable[..., Any] | None = None,
        seed_layers: bool = False,
        seed_fn: Callable[[int], Any] | None = None,
        base_seed: int = 1234,
        partition_method: str = "parameters",
        activation_checkpoint_interval: int = 0,
        activation_checkpoint_func: Callable[..., Any] = checkpoint,
        checkpointable_layers: Sequence[str] | None = None,
        dynamic_shape: bool = False,
        *,
        schedule: str = "1f1b",
        stages_per_rank: int = 1,
        profile_input: Any = None,
    ) -> None:
        super().__init__()
        rank, world = this_rank()
        self._topology = _topology(num_stages, topology, world)
        self.num_stages = self._topology.get_dim("pipe")
        self.stage_id: int = self._topology.get_coord(rank).pipe
        check_schedule(schedule, stages_per_rank)
        self.schedule, self.stages_per_rank = schedule, stages_per_rank
        self.loss_fn = loss_fn
        self.dynamic_shape = dynamic_shape
        self.partition_method = partition_method
        self.seed_layers, self.seed_fn, self.base_seed = seed_layers, seed_fn or torch.manual_seed, base_seed
        self.activation_checkpoint_interval = activation_checkpoint_interval
        self.activation_checkpoint_func = activation_checkpoint_func
        self.checkpointable_layers = None if checkpointable_layers is None else list(checkpointable_layers)
        self._layer_specs = list(layers)
        _check_layers(self._layer_specs)
        self.parts = self._partition(profile_input)
        self.own_stages = stages_of(schedule, self.stage_id, self.num_stages, stages_per_rank)
        self._calls: dict[int, Callable[[Any], Any]] = {}
        self.tied: dict[str, tuple[int, ...]] = self._find_ties()
        self._check_parameters()
        self._build()

    @staticmethod
    def from_model(
        model: nn.Module,
        num_stages: int,
        *,
        partition_method: str = "parameters",
        loss_fn: Callable[..., Any] | None = None,
        schedule: str = "1f1b",
        stages_per_rank: int = 1,
        example: Any = None,
    ) -> PipelineStages:
        """Cuts a model with an nn.ModuleList of blocks, such as Hugging Face's causal models, in place, for
        `zeroxide.initialize`. Every rank has the whole model, on the meta device if it is large, and keeps its part.

        Every stage takes the same batches: mappings by the names of the model's arguments. The loss is the model's own,
        or `loss_fn(outputs, labels)`, for which "labels" is taken out of the batch. Weights that are one parameter of
        the model stay equal wherever they are used.

        example: a micro-batch, to find out what runs where; known for models that take `input_ids`.
        partition_method: see the class; blocks count with what runs before and after them.

        Raises ModelError, naming what stands in the way, for a model whose blocks cannot be run apart.
        """
        from zeroxide.parallel.pipe.cut import cut_model

        cut = cut_model(
            model,
            num_stages,
            partition_method=partition_method,
            loss_fn=loss_fn,
            schedule=schedule,
            stages_per_rank=stages_per_rank,
            example=example,
        )
        cut.commit()
        return cut

    # Where layers are ------------------------------------------------------------------------------------------------

    def uses(self, stage: int, name: str) -> bool:
        """See `PipelineStages`; what is tied counts everywhere."""
        first = name.partition(".")[0]
        return not first.isdecimal() or int(first) in self.layers_of(stage)

    def layers_of(self, stage: int) -> range:
        """The numbers of a stage's layers."""
        return bounds_of(self.parts, stage)

    def bounds(self) -> list[int]:
        """See `PipelineStages`."""
        return self.parts

    def stage_owner(self, layer_idx: int) -> int:
        """The rank of the pipeline that has a layer."""
        stage = next(stage for stage in range(self.total_stages) if layer_idx in self.layers_of(stage))
        return rank_of_stage(self.schedule, stage, self.num_stages)

    def topology(self) -> ProcessTopology:
        """The ranks, by stage and samples."""
        return self._topology

    def num_pipeline_stages(self) -> int:
        """Ranks of the pipeline."""
        return self.num_stages

    def _partition(self, profile_input: Any) -> list[int]:
        specs = self._layer_specs
        seconds = None
        parameters = [0] * len(specs)
        method = self.partition_method.lower()
        if method == "profile":
            seconds = measure_layers([self._measurable(at) for at in range(len(specs))], profile_input)
        elif method in ("parameters", "best"):
            parameters = [_count_parameters(spec) for spec in specs]
        return cut_by(self.partition_method, [_name_of(spec) for spec in specs], parameters, self.total_stages, seconds)

    def _measurable(self, at: int) -> Callable[[], Callable[[Any], Any]]:
        spec = self._layer_specs[at]

        def make() -> Callable[[Any], Any]:
            if not isinstance(spec, LayerSpec):
                return spec  # type: ignore[no-any-return]
            module = spec.build()
            forward_fn = spec.forward_fn if isinstance(spec, TiedLayerSpec) else None
            return module if forward_fn is None else lambda inputs: forward_fn(module, inputs)

        return make

    def _find_ties(self) -> dict[str, tuple[int, ...]]:
        """Of each key, the ranks of the pipeline that have a layer of it, ascending."""
        found: dict[str, set[int]] = {}
        for at, spec in enumerate(self._layer_specs):
            if isinstance(spec, TiedLayerSpec):
                found.setdefault(spec.key, set()).add(self.stage_owner(at))
        return {key: tuple(sorted(ranks)) for key, ranks in found.items()}

    def ties(self) -> dict[str, tuple[int, ...]]:
        """See `PipelineStages`."""
        found = {}
        for spec in self._layer_specs:
            if isinstance(spec, TiedLayerSpec) and len(ranks := self.tied[spec.key]) > 1:
                found.update({f"{TIED}.{spec.key}.{name}": ranks for name in spec.tied_weight_attr})
        return found

    # Building --------------------------------------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        """Raises ModelError, on all ranks alike, where one would have nothing to train."""
        for rank in range(self.num_stages):
            stages = stages_of(self.schedule, rank, self.num_stages, self.stages_per_rank)
            specs = (self._layer_specs[at] for stage in stages for at in self.layers_of(stage))
            if not any(_count_parameters(spec, frozen=True) for spec in specs):
                raise ModelError(
                    f"rank {rank} of {self.num_stages} of the pipeline has no parameter, and so nothing to train: use "
                    f"fewer stages, or another partition_method than {self.partition_method!r}"
                )

    def _build(self) -> None:
        tied = nn.ModuleDict()
        for stage in self.own_stages:
            for at in self.layers_of(stage):
                self._build_layer(at, tied)
        if tied:
            self.add_module(TIED, tied)
        for spec in self._layer_specs:
            if isinstance(spec, TiedLayerSpec) and spec.key in tied:
                _check_tied(spec, tied[spec.key], self.tied[spec.key])
        # What other stages have is let go of.
        self._layer_specs = [spec if isinstance(spec, LayerSpec) else None for spec in self._layer_specs]

    def _build_layer(self, at: int, tied: nn.ModuleDict) -> None:
        spec = self._layer_specs[at]
        if self.seed_layers:
            self.seed_fn(self.base_seed + at)
        if isinstance(spec, TiedLayerSpec):
            if spec.key not in tied:
                if self.seed_layers:
                    # As where it is used first, on whichever stage.
                    self.seed_fn(self.base_seed + self._first_of(spec.key))
                tied[spec.key] = spec.build()
            module, forward_fn = tied[spec.key], spec.forward_fn
            self._calls[at] = module if forward_fn is None else lambda inputs: forward_fn(module, inputs)
            return
        layer = spec.build() if isinstance(spec, LayerSpec) else spec
        if isinstance(layer, nn.Module):
            self.add_module(str(at), layer)
        self._calls[at] = layer

    def _first_of(self, key: str) -> int:
        return next(
            at for at, spec in enumerate(self._layer_specs) if isinstance(spec, TiedLayerSpec) and spec.key == key
        )

    # Running ---------------------------------------------------------------------------------------------------------

    def forward(self, stage: int, inputs: Any) -> Any:
        """Runs the layers of one of this rank's stages over what the stage before gave, or the model's input."""
        layers = self.layers_of(stage)
        every = self.activation_checkpoint_interval
        if not every or not torch.is_grad_enabled():
            return self._run(layers, inputs)
        for first in range(layers.start, layers.stop, every):
            piece = range(first, min(first + every, layers.stop))
            inputs = self._recomputed(piece, inputs) if self._is_checkpointable(piece) else self._run(piece, inputs)
        return inputs

    def _run(self, layers: range, inputs: Any) -> Any:
        for at in layers:
            inputs = self._calls[at](inputs)
        return inputs

    def _recomputed(self, layers: range, inputs: Any) -> Any:
        plain = self.activation_checkpoint_func is checkpoint
        more = {"use_reentrant": False} if plain else {}
        if isinstance(inputs, tuple):
            return self.activation_checkpoint_func(lambda *given: self._run(layers, given), *inputs, **more)
        return self.activation_checkpoint_func(lambda given: self._run(layers, given), inputs, **more)

    def _is_checkpointable(self, layers: range) -> bool:
        calls = [self._calls[at] for at in layers]
        if self.checkpointable_layers is not None:
            return all(type(each).__name__ in self.checkpointable_layers for each in calls)
        return any(isinstance(each, nn.Module) and next(each.parameters(), None) is not None for each in calls)

    @property
    def module(self) -> nn.Module:
        """See `PipelineStages`."""
        return self

    def arguments(self, stage: int, received: Any, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See `PipelineStages`."""
        return (stage, self._halves(batch)[0] if stage == 0 else received), {}

    def loss_of(self, outputs: Any, batch: Any) -> Any:
        """See `PipelineStages`."""
        return outputs if self.loss_fn is None else self.loss_fn(outputs, self._halves(batch)[1])

    def shared_of(self, batch: Any) -> Any:
        """See `PipelineStages`. What the first layer takes may be drawn anew by each rank; labels say which sample."""
        return None if self.loss_fn is None else self._halves(batch)[1]

    def needs_batches(self) -> bool:
        """See `PipelineStages`."""
        last = self.total_stages - 1 in self.own_stages
        return 0 in self.own_stages or (last and self.loss_fn is not None)

    def _halves(self, batch: Any) -> tuple[Any, Any]:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            shown = f"{len(batch)} items" if isinstance(batch, (tuple, list)) else type(batch).__name__
            raise DataError(
                f"a batch of a PipelineModule is a pair, what its first layer takes and the labels, got {shown}: give "
                "pairs, or what makes them by engine.set_batch_fn"
            )
        return batch[0], batch[1]

    # What DeepSpeed's has --------------------------------------------------------------------------------------------

    def get_additional_losses(self) -> None:
        """None: a model that has more losses adds them in `loss_fn`."""

    def allreduce_tied_weight_gradients(self) -> None:
        """Does nothing: the engine sums them in every step."""

    def mpu(self) -> Any:
        """The grid of ranks, as DeepSpeed's `mpu`; every rank calls it, since groups are made."""
        from zeroxide.parallel.pipe.topology import PipelineParallelGrid

        return PipelineParallelGrid(self._topology)


def _topology(num_stages: int | None, topology: ProcessTopology | None, world: int) -> ProcessTopology:
    if num_stages is None and topology is None:
        raise ConfigError("PipelineModule needs num_stages or topology", path="num_stages")
    if topology is None:
        assert num_stages is not None
        if num_stages < 1 or world % num_stages:
            raise RanksError(
                f"PipelineModule: num_stages = {num_stages} does not divide the {world} ranks: each pipeline takes a "
                "rank for every stage"
            )
        return PipeDataParallelTopology(num_stages, world // num_stages)
    if topology.world_size() != world:
        raise RanksError(f"PipelineModule: the topology is of {topology.world_size()} ranks, and there are {world}")
    if num_stages is not None and topology.get_dim("pipe") != num_stages:
        raise RanksError(
            f"PipelineModule: num_stages = {num_stages}, and the topology has {topology.get_dim('pipe')} along 'pipe'"
        )
    return topology


def _check_layers(layers: Sequence[Any]) -> None:
    """Raises ModelError for what is no layer, and for parameters that several layers have without saying so."""
    seen: dict[int, tuple[int, str]] = {}
    for at, layer in enumerate(layers):
        if not isinstance(layer, LayerSpec) and not callable(layer):
            raise ModelError(f"PipelineModule: layer {at} is {layer!r}: expected a module, a LayerSpec or a callable")
        for name, param in layer.named_parameters() if isinstance(layer, nn.Module) else ():
            other = seen.setdefault(id(param), (at, name))
            if other[0] != at:
                raise ModelError(
                    f"PipelineModule: layers {other[0]} and {at} share a parameter ({other[1]}, {name}): describe both "
                    "with TiedLayerSpec and one key, so that stages know of it",
                    name=name,
                )


def _check_tied(spec: TiedLayerSpec, module: nn.Module, ranks: Sequence[int]) -> None:
    names = dict(module.named_parameters())
    for name in spec.tied_weight_attr:
        if name not in names:
            raise ModelError(
                f"TiedLayerSpec {spec.key!r}: tied_weight_attr names {name!r}, and {spec.typename.__name__} has "
                f"{', '.join(names) or 'no parameter'}",
                name=name,
            )
    left = [name for name in names if name not in spec.tied_weight_attr]
    if left and len(ranks) > 1:
        raise ModelError(
            f"TiedLayerSpec {spec.key!r} is on stages {', '.join(map(str, ranks))}, and its {left[0]} is not tied: "
            "name it in tied_weight_attr, so that all copies stay one",
            name=left[0],
        )


def _name_of(layer: Any) -> str:
    if isinstance(layer, LayerSpec):
        return layer.typename.__name__
    return type(layer).__name__ if isinstance(layer, nn.Module) else str(getattr(layer, "__name__", layer))


def _count_parameters(layer: Any, *, frozen: bool = False) -> int:
    """Trainable elements, or all; a layer that is only described is built without values to be counted."""
    if isinstance(layer, LayerSpec):
        with torch.device("meta"):
            layer = layer.build()
    if not isinstance(layer, nn.Module):
        return 0
    return sum(param.numel() for param in layer.parameters() if frozen or param.requires_grad)

"""Cuts a model in place: each rank keeps its part of every matrix that has a rule.

Weights are first views of what the model has, so that a construction that fails leaves it as it was; an engine then
makes them those of the group's first rank, and lets go of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import unwrap
from typing import Any

import torch
from torch import nn

from zeroxide.errors import ModelError
from zeroxide.parallel.tensor.cross_entropy import causal_lm_loss
from zeroxide.parallel.tensor.cut import SHARD, Range, TensorShard, cut_blocks, shard_of
from zeroxide.parallel.tensor.group import TensorGroup
from zeroxide.parallel.tensor.layers import (
    ColumnEmbedding,
    ColumnLinear,
    RowLinear,
    VocabParallelEmbedding,
    is_conv1d,
    make_parallel,
)
from zeroxide.parallel.tensor.region import Region
from zeroxide.parallel.tensor.spec import OWN_PLAN, LayerRule

__all__ = ["Sharding", "keep_logits_apart", "shard_model"]

Ranges = tuple[tuple[Range, ...], ...]
"""By rank, see `TensorShard`."""

_HEAD_SIZES = ("head_dim", "key_value_proj_dim", "attention_head_size", "head_size")
_COUNTS = (
    "num_heads",
    "n_heads",
    "n_head",
    "num_attention_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "split_size",
    "inner_dim",
    "all_head_size",
    "embed_dim",
)
"""Numbers that an attention layer keeps of all its heads, and in whose place it has those of this rank."""


@dataclass
class _Layer:
    """One module that is cut."""

    name: str
    module: Any
    rule: LayerRule
    dim: int
    """Of the weight, that is cut."""
    blocks: tuple[int, ...]
    """Sizes of what is fused along it."""

    @property
    def embeds(self) -> bool:
        return isinstance(self.module, nn.Embedding)


@dataclass
class Sharding:
    """What was cut of a model."""

    group: TensorGroup
    full: dict[int, tuple[nn.Parameter, torch.Tensor]] = field(default_factory=dict)
    """What each parameter that was cut has been, by its id; until `spread`."""
    summed: set[str] = field(default_factory=set)
    """Names of parameters that are the same on all ranks, and of whose gradients each rank has a part."""

    def restore(self) -> None:
        """Gives the parameters all their values back, where they have not moved on. Modules are not its concern."""
        for param, values in self.full.values():
            param.data = values
            param.__dict__.pop(SHARD, None)
        self.full.clear()


def shard_model(module: nn.Module, rules: Mapping[str, LayerRule], made: Sharding) -> None:
    """Cuts `module` by its rules, over the group of `made`, which keeps what it was.

    Raises ModelError, on every rank alike, for a layer that cannot be cut, heads that do not go round, and weights
    shared with a layer that is not cut. `made.restore` then gives the parameters back what they were.
    """
    group = made.group
    layers = [found for name, rule in rules.items() if (found := _layer(module, name, rule)) is not None]
    owners = _owners(module, layers)
    cuts: dict[str, Ranges] = {}
    for owner, members in owners.items():
        cuts |= _cut(module.get_submodule(owner), owner, members, group)
    shards = _shards(layers, cuts, group)
    _check_shared(module, layers, shards)
    made.summed |= _summed(module, rules)
    regions = {owner: Region(group, module.get_submodule(owner)) for owner, each in owners.items() if _is_region(each)}
    for layer in layers:
        _make(layer, cuts[layer.name], made, regions.get(layer.name.rpartition(".")[0]), shards)
    for owner in regions:
        # A model that brings its plan was written to be cut, and derives sizes from what it is given.
        if not any(each.rule.origin.startswith(OWN_PLAN) for each in owners[owner]):
            _localise(module.get_submodule(owner), owners[owner], cuts)


def _layer(module: nn.Module, name: str, rule: LayerRule) -> _Layer | None:
    if rule.kind == "skip":
        return None
    found = module.get_submodule(name)
    if getattr(found, "weight", found) is None:
        # Another stage of a pipeline has it.
        return None
    if isinstance(found, nn.Linear):
        dim = 0 if rule.kind == "column" else 1
    elif is_conv1d(found) or isinstance(found, nn.Embedding):
        dim = 1 if rule.kind == "column" else 0
    else:
        raise ModelError(
            f"{name} is a {type(found).__name__}, which {rule.origin} asks to cut: expected nn.Linear, nn.Embedding or "
            'Conv1D; adapters come after, and layers of other kinds stay as they are with partition_type "skip"',
            name=name,
        )
    weight = found.weight
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or not weight.dtype.is_floating_point:
        raise ModelError(f"{name}.weight is no matrix of floating-point numbers, which alone is cut", name=name)
    size = weight.shape[dim]
    blocks = rule.blocks
    if isinstance(blocks, int):
        if size % blocks:
            raise ModelError(f"{name}: {size} does not divide into {blocks} weights, as {rule.origin} says", name=name)
        blocks = (size // blocks,) * blocks
    if sum(blocks) != size:
        raise ModelError(f"{name}: weights of {blocks} make {sum(blocks)}, and it has {size}", name=name)
    return _Layer(name, found, rule, dim, blocks)


def _owners(module: nn.Module, layers: list[_Layer]) -> dict[str, list[_Layer]]:
    """The layers by the module that has them, those apart that stand for themselves."""
    found: dict[str, list[_Layer]] = {}
    for layer in layers:
        found.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    return found


def _alone(layer: _Layer) -> bool:
    """Whether it takes and gives what all ranks have alike."""
    if layer.rule.kind == "column":
        return layer.rule.gather_output
    return layer.embeds or layer.rule.split_input


def _is_region(members: list[_Layer]) -> bool:
    return any(not _alone(each) for each in members)


def _cut(owner: nn.Module, name: str, members: list[_Layer], group: TensorGroup) -> dict[str, Ranges]:
    """The ranges of every rank of each layer, by its name: layers that work on the same parts are cut alike."""
    found = {}
    together = [each for each in members if not _alone(each)]
    head = _head_size(owner, name, together)
    counts = [
        block if each.embeds else block // head if block % head == 0 else 0
        for each in together
        for block in each.blocks
    ]
    groups = math.gcd(*counts) if counts else 0
    if together and min(counts) == 0:
        raise ModelError(f"{name}: its layers are no multiples of the head size {head}", name=name)
    for each in members:
        parts = math.gcd(*each.blocks) if _alone(each) else groups
        if parts < group.size:
            what = "heads of keys and values" if head > 1 and not _alone(each) else "columns or rows"
            raise ModelError(
                f"{each.name} has {parts} {what}, which {group.size} tensor ranks cannot share: use at most "
                f"autotp_size {parts}",
                name=each.name,
            )
        found[each.name] = cut_blocks(each.blocks, parts, group.size)
    return found


def _head_size(owner: nn.Module, name: str, members: list[_Layer]) -> int:
    for known in _HEAD_SIZES:
        value = getattr(owner, known, None)
        if isinstance(value, int) and value > 0:
            return value
    if members and "attention" in type(owner).__name__.lower():
        raise ModelError(
            f"{name} is a {type(owner).__name__} that does not say its head size, and heads are not cut: give it an "
            f"attribute {_HEAD_SIZES[0]}",
            name=name,
        )
    return 1


def _shards(layers: list[_Layer], cuts: Mapping[str, Ranges], group: TensorGroup) -> dict[int, TensorShard]:
    """How each weight is cut, by its id. Raises ModelError where two layers that share one cut it in two ways."""
    found: dict[int, TensorShard] = {}
    for layer in layers:
        weight = layer.module.weight
        shard = TensorShard(tuple(weight.shape), layer.dim, cuts[layer.name], group.position)
        known = found.setdefault(id(weight), shard)
        if known != shard:
            raise ModelError(f"{layer.name}.weight is shared with a layer that cuts it in another way", name=layer.name)
    return found


def _check_shared(module: nn.Module, layers: list[_Layer], shards: Mapping[int, TensorShard]) -> None:
    cut = {id(layer.module) for layer in layers}
    for name, owner in module.named_modules():
        for key, param in owner._parameters.items():
            if param is not None and id(param) in shards and id(owner) not in cut:
                raise ModelError(
                    f"{name}.{key} is shared with a layer that is cut, and {name} has no rule: give it one in "
                    'tensor_parallel.partition_config.layer_specs, or the other one "skip"',
                    name=name,
                )


def _summed(module: nn.Module, rules: Mapping[str, LayerRule]) -> set[str]:
    return {
        f"{name}.{inner}"
        for name, rule in rules.items()
        if rule.grad_allreduce
        for inner, _ in module.get_submodule(name).named_parameters()
    }


def _make(layer: _Layer, cut: Ranges, made: Sharding, region: Region | None, shards: Mapping[int, TensorShard]) -> None:
    module, rule, group = layer.module, layer.rule, made.group
    shard = shards.get(id(module.weight)) or shard_of(module.weight)
    assert shard is not None
    own = None if _alone(layer) else region
    if layer.embeds and rule.kind == "column":
        make_parallel(module, ColumnEmbedding, shard, group, own, gathers=rule.gather_output)
        module.embedding_dim = shard.length
    elif layer.embeds:
        padding, ((first, count),) = module.padding_idx, shard.own
        here = padding is not None and first <= padding < first + count
        make_parallel(module, VocabParallelEmbedding, shard, group, own)
        module.num_embeddings, module.padding_idx = count, padding - first if here else None
    elif rule.kind == "column":
        make_parallel(module, ColumnLinear, shard, group, own, gathers=rule.gather_output)
        setattr(module, "nf" if layer.dim == 1 else "out_features", shard.length)
    else:
        make_parallel(module, RowLinear, shard, group, own, splits=rule.split_input)
        setattr(module, "nx" if layer.dim == 0 else "in_features", shard.length)
    _take(module.weight, shard, made)
    bias = getattr(module, "bias", None)
    if rule.kind == "column" and not layer.embeds and bias is not None:
        _take(bias, TensorShard(tuple(bias.shape), 0, cut, group.position), made)


def _take(param: nn.Parameter, shard: TensorShard, made: Sharding) -> None:
    if id(param) in made.full:
        return
    made.full[id(param)] = param, param.data
    param.data = shard.take(param.data)
    setattr(param, SHARD, shard)


def _localise(owner: nn.Module, members: list[_Layer], cuts: Mapping[str, Ranges]) -> None:
    """Numbers that the module keeps of all heads become those of this rank's."""
    layer = next(each for each in members if not _alone(each))
    shard = shard_of(layer.module.weight)
    assert shard is not None
    for name in _COUNTS:
        value = vars(owner).get(name)
        if isinstance(value, int) and value * shard.length % sum(layer.blocks) == 0:
            setattr(owner, name, value * shard.length // sum(layer.blocks))


def keep_logits_apart(module: Any, group: TensorGroup) -> None:
    """Lets a causal model's loss be computed of each rank's logits, which are not put together any more.

    Raises ModelError for a model that computes no loss by its `loss_function`, or whose head is not cut.
    """
    head = getattr(module, "lm_head", None)
    if head is not None and getattr(head, "weight", head) is None:
        # Another stage of a pipeline has it, and the loss.
        return
    if not isinstance(head, ColumnLinear) or not head.gathers:
        raise ModelError(
            f"tensor_parallel.vocab_parallel_lm_head: {type(module).__name__} has no lm_head that is cut by "
            "column with all of its output: leave the key out",
            name="lm_head",
        )
    if "loss_function" not in unwrap(type(module).forward).__code__.co_names:
        raise ModelError(
            f"tensor_parallel.vocab_parallel_lm_head: {type(module).__name__} computes its loss of all logits by "
            "itself: leave the key out",
            name="lm_head",
        )
    ((first, _),) = head.weight_shard.own
    head.gathers = False
    module.loss_function = partial(causal_lm_loss, group, first)

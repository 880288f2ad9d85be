"""A model whose matrices are cut over tensor-parallel ranks, from what the caller gives to what an engine trains.

From the time it is cut, everything of an engine sees a model of smaller matrices, and knows nothing of other parts.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from zeroxide.config import Config
from zeroxide.device.placement import HOST, has_values, in_host, is_host
from zeroxide.distributed import Job, Watch, agree, model_facts
from zeroxide.engine.tp_model_init import check_dtype
from zeroxide.errors import RanksError
from zeroxide.parallel.tensor import Sharding, TensorGroup, TensorShard, find_rules, shard_model, shard_of
from zeroxide.parallel.tensor.region import drops
from zeroxide.parallel.tensor.shard import keep_logits_apart
from zeroxide.precision.bits import bytes_of, tensor_of
from zeroxide.zero.buffers import share_buffers
from zeroxide.zero.hook_handle import Hook
from zeroxide.zero.init.materialize import PieceSource, WeightSource
from zeroxide.zero.nested import tensors_in
from zeroxide.zero.unit import Unit

__all__ = ["TensorParallel", "Uncut", "cut_matrices"]


class Uncut:
    """A model of which every rank has all, or a part that has nothing to do with its matrices."""

    group: TensorGroup | None = None
    """The ranks over which matrices are cut; None where they are not."""
    beside = 0
    """Resident bytes of the caller's weights beside this rank's part of them."""

    def restore(self) -> None:
        """Gives the parameters back what they were."""

    def spread(self, module: nn.Module, weights: WeightSource | None) -> WeightSource | None:
        """Makes the values of the first rank those of all; returns what makes this rank's part of weights on the meta
        device, where `weights` makes all of them."""
        return weights

    def attach(self, module: nn.Module, units: list[Unit]) -> None:
        """The parameters have their units, and no values any more."""

    def repeated(self, units: list[Unit]) -> frozenset[tuple[int, int]]:
        """(unit, position) of trainable parameters whose gradients another rank counts in the norm."""
        return frozenset()

    def align_random(self) -> None:
        """Makes random numbers the same where ranks must draw the same."""


def cut_matrices(module: nn.Module, config: Config, job: Job, watch: Watch, made: ExitStack) -> Uncut:
    """Cuts `module` in place over the tensor-parallel ranks of `job`, if there are any; `made` gives its parameters
    back what they were. Every rank calls it.

    Raises RanksError where these ranks have different models, and ModelError for one that cannot be cut so.
    """
    check_dtype(module, config)
    if job.tensor.world == 1:
        return Uncut()
    agree(job.tensor, model_facts(module))
    found = TensorParallel(job, watch)
    made.callback(found.restore)
    found.cut(module, config)
    return found


class TensorParallel(Uncut):
    """A model that is cut."""

    def __init__(self, job: Job, watch: Watch) -> None:
        self.job = job
        self.group: TensorGroup = TensorGroup(job.tensor)
        self.group.waiting = watch.waiting
        self._sharding = Sharding(self.group)
        self._generators: list[Any] = [torch]
        """What draws random numbers where the model computes, and has `get_rng_state` and `set_rng_state`."""
        self._shards: dict[str, TensorShard] = {}
        """How what is cut is cut, by all its names."""

    def cut(self, module: nn.Module, config: Config) -> None:
        """Cuts the model; see `cut_matrices`."""
        rules = find_rules(
            module,
            config.tensor_parallel.layer_specs,
            config.tensor_parallel.preset_model,
            defaults=config.tensor_parallel.use_default_specs,
        )
        shard_model(module, rules, self._sharding)
        if config.tensor_parallel.vocab_parallel_lm_head:
            keep_logits_apart(module, self.group)
        for name, param in module.named_parameters(remove_duplicate=False):
            shard = shard_of(param)
            if shard is not None:
                self._shards[name] = shard

    @property
    def beside(self) -> int:  # type: ignore[override]
        """See `Uncut`."""
        return sum(full.nbytes for _, full in self._sharding.full.values() if has_values(full) and is_host(full.device))

    def restore(self) -> None:
        """See `Uncut`. Classes and attributes of modules are the concern of `Undo`."""
        self._sharding.restore()

    @torch.no_grad()
    def spread(self, module: nn.Module, weights: WeightSource | None) -> WeightSource | None:
        """See `Uncut`; each rank then has its own part, and nobody all of it."""
        full = self._sharding.full
        first = self.job.ranks.rank == 0
        for param in {id(each): each for each in module.parameters()}.values():
            shard = shard_of(param)
            if not has_values(param) or (shard is not None and id(param) not in full):
                # It was on the meta device: `weights` makes it.
                continue
            with torch._C.DisableTorchFunctionSubclass():
                values = param.data if shard is None else full.pop(id(param))[1]
                if first:
                    # Those of the other replicas get them when the engine is filled.
                    values = self._first_of(values)
                if shard is not None:
                    values = shard.take(values).clone(memory_format=torch.contiguous_format)
                param.data = values
        full.clear()
        kind = _CutPieces if isinstance(weights, PieceSource) else _CutSource
        return None if weights is None else kind(weights, self._shards, self.group)

    def _first_of(self, values: torch.Tensor) -> torch.Tensor:
        given = bytes_of(in_host(values))
        raw = self.group.broadcast(given if self.group.position == 0 else given.clone(), "sharing the first weights")
        return tensor_of(raw, values.dtype, values.shape).to(values.device)

    def attach(self, module: nn.Module, units: list[Unit]) -> None:
        """See `Uncut`."""
        share_buffers(module, self.group.ranks)
        for unit in units:
            for name, param in zip(unit.names, unit.params, strict=True):
                if name in self._sharding.summed and param.requires_grad:
                    param.register_hook(Hook(self._sum_gradient))  # type: ignore[no-untyped-call]
        if units and not is_host(units[0].device):
            self._generators.append(torch.get_device_module(units[0].device))
        module.register_forward_pre_hook(Hook(self._check_inputs), prepend=True, with_kwargs=True)
        self.align_random()

    def _sum_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        return self.group.all_reduce(total, "the sum of a gradient over tensor ranks")

    def repeated(self, units: list[Unit]) -> frozenset[tuple[int, int]]:
        """See `Uncut`: all that is not cut, on all ranks of the group but the first."""
        if self.group.position == 0:
            return frozenset()
        return frozenset(
            (unit.index, position)
            for unit in units
            for position, param in enumerate(unit.params)
            if unit.trainable[position] and shard_of(param) is None
        )

    def align_random(self) -> None:
        """See `Uncut`: outside of what is cut, all ranks of a group drop the same."""
        for each in self._generators:
            each.set_rng_state(self.group.broadcast(each.get_rng_state(), "aligning random numbers"))

    def _check_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Raises RanksError on every rank of the group where they were given different samples, or would draw different
        random numbers."""
        found = 0
        for tensor in tensors_in((args, kwargs)):
            if is_host(tensor.device):
                found = zlib.crc32(bytes_of(tensor).numpy().data, found)
        drawn = 0
        for each in self._generators if module.training and drops(module) else ():
            drawn = zlib.crc32(each.get_rng_state().numpy().data, drawn)
        mine = torch.tensor([found, drawn], dtype=torch.int64, device=HOST)
        rows = self.group.gather_rows(mine, "comparing the samples of tensor ranks")
        for column, what, remedy in (
            (0, "were given different samples", "give all ranks of a tensor-parallel group the same batch"),
            (1, "would draw different random numbers", "seed the ranks of a tensor-parallel group alike"),
        ):
            odd = [position for position, row in enumerate(rows.tolist()) if row[column] != rows[0][column]]
            if odd:
                first, other = self.group.ranks.number(0), self.group.ranks.number(odd[0])
                raise RanksError(
                    f"ranks {first} and {other}, which share every matrix, {what}: {remedy}", ranks=(other,)
                )


class _CutSource:
    """Makes this rank's part of what another source makes: the first rank's, of all of it."""

    def __init__(self, weights: Any, shards: dict[str, TensorShard], group: TensorGroup) -> None:
        self.weights = weights
        self.shards = shards
        self.group = group

    def fill(self, tensors: dict[str, torch.Tensor], modules: dict[str, nn.Module]) -> None:
        """See `WeightSource`."""
        full = {
            name: torch.zeros(self.shards[name].shape, dtype=each.dtype, device=HOST) if name in self.shards else each
            for name, each in tensors.items()
        }
        self.weights.fill(full, modules)
        for name, each in full.items():
            values = self.group.broadcast(each.contiguous(), "sharing the first weights")
            if name in self.shards:
                values = self.shards[name].take(values)
            if values is not tensors[name]:
                tensors[name].copy_(values)


class _CutPieces(_CutSource):
    """The same of a source that makes weights in pieces."""

    def pieces(self, name: str, shape: torch.Size) -> Iterator[tuple[int, torch.Tensor]]:
        """See `PieceSource`; of what is cut, one piece."""
        shard = self.shards.get(name)
        if shard is None:
            for start, piece in self.weights.pieces(name, shape):
                yield start, self.group.broadcast(piece, "sharing the first weights")
            return
        full = torch.empty(shard.shape, dtype=torch.float32, device=HOST)
        for start, piece in self.weights.pieces(name, full.shape):
            full.view(-1)[start : start + piece.numel()] = piece
        yield 0, shard.take(self.group.broadcast(full, "sharing the first weights")).reshape(-1)

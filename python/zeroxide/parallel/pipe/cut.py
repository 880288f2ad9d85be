"""Cuts a model with a row of blocks into stages where it is, without another word from its author.

Every stage runs the model's own forward over the same batch. Blocks of other stages let pass what they are given; the
last of those before the stage's own gives what came from the stage before; the first one after them ends forward by an
exception. What runs before the blocks gives zeros of the right shape on later stages, whose values nobody looks at:
`row.py` has seen that nothing but the hidden state depends on parameters. What runs after them is on the last stage.

Names of parameters stay those of the whole model.
"""

from __future__ import annotations

import copy
import functools
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from zeroxide.errors import DataError, ModelError, PipelineError, RanksError
from zeroxide.parallel.pipe.module import this_rank
from zeroxide.parallel.pipe.partition import bounds_of, cut_by
from zeroxide.parallel.pipe.profile import ROUNDS, told_by_rank_0
from zeroxide.parallel.pipe.row import (
    AFTER,
    AROUND,
    BEFORE,
    Row,
    call_of,
    example_for,
    find_row,
    hidden_in,
    without_values,
)
from zeroxide.parallel.pipe.schedule import check_schedule, rank_of_stage, stages_of
from zeroxide.parallel.pipe.stages import PipelineStages
from zeroxide.params.handle import handle_of
from zeroxide.plan.discover import STAND_IN

__all__ = ["CutModel", "cut_for", "cut_model"]


class _StageEnd(Exception):
    """The stage's last block has run, and forward ends."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def cut_model(
    model: nn.Module,
    num_stages: int,
    *,
    partition_method: str = "parameters",
    loss_fn: Callable[..., Any] | None = None,
    schedule: str = "1f1b",
    stages_per_rank: int = 1,
    example: Any = None,
) -> CutModel:
    """Cuts `model`, which every rank has, in place: it keeps this rank's part. See `PipelineModule.from_model`."""
    rank, world = this_rank()
    if num_stages < 1 or world % num_stages:
        raise RanksError(f"num_stages = {num_stages} does not divide the {world} ranks")
    return cut_for(
        model,
        num_stages,
        rank // (world // num_stages),
        partition_method=partition_method,
        loss_fn=loss_fn,
        schedule=schedule,
        stages_per_rank=stages_per_rank,
        example=example,
    )


def cut_for(
    model: nn.Module,
    num_stages: int,
    stage_id: int,
    *,
    partition_method: str = "parameters",
    loss_fn: Callable[..., Any] | None = None,
    schedule: str = "1f1b",
    stages_per_rank: int = 1,
    example: Any = None,
    row: Row | None = None,
) -> CutModel:
    """Cuts `model` in place as rank `stage_id` of a pipeline has it. row: what `find_row` has found of such a model."""
    check_schedule(schedule, stages_per_rank)
    for name, param in model.named_parameters():
        if handle_of(param) is not None:
            raise ModelError(
                f"{name} was cut by zero.Init, or is an engine's: build a model that is to be cut into stages without, "
                "on the meta device if it is large",
                name=name,
            )
    row = row or find_row(model, example)
    parts = num_stages * stages_per_rank
    seconds = None
    if partition_method.lower() == "profile":
        seconds = told_by_rank_0(lambda: _measured(model, row, example))
    blocks = [row.block(model, at) for at in range(row.count)]
    parameters = [sum(param.numel() for param in block.parameters() if param.requires_grad) for block in blocks]
    parameters[0] += _elements(model, row, BEFORE)
    parameters[-1] += _elements(model, row, AFTER)
    bounds = cut_by(partition_method, [type(block).__name__ for block in blocks], parameters, parts, seconds)
    made = CutModel(model, row, bounds, num_stages, stages_per_rank, stage_id, schedule, loss_fn)
    made.partition_method = partition_method
    return made


class CutModel(PipelineStages):
    """A model that has been cut in place."""

    def __init__(
        self,
        model: nn.Module,
        row: Row,
        bounds: list[int],
        num_stages: int,
        stages_per_rank: int,
        stage_id: int,
        schedule: str,
        loss_fn: Callable[..., Any] | None,
    ) -> None:
        self.num_stages, self.stages_per_rank, self.stage_id = num_stages, stages_per_rank, stage_id
        self.schedule, self.loss_fn = schedule, loss_fn
        self.own_stages = stages_of(schedule, stage_id, num_stages, stages_per_rank)
        self.row = row
        self._bounds = bounds
        self._model = model
        self._forward = model.forward
        self._undo: list[Callable[[], None]] = []
        self._stage: int | None = None
        self._received: torch.Tensor | None = None
        self._ties = self._find_ties()
        self._own: dict[int, nn.Module] = {}
        self._stand_ins: list[nn.Module] = []
        self._cut()

    @property
    def module(self) -> nn.Module:
        """See `PipelineStages`."""
        return self._model

    def blocks_of(self, stage: int) -> range:
        """The numbers of a stage's blocks."""
        return bounds_of(self._bounds, stage)

    def bounds(self) -> list[int]:
        """See `PipelineStages`."""
        return self._bounds

    def needs_batches(self) -> bool:
        """See `PipelineStages`."""
        return True

    def uses(self, stage: int, name: str) -> bool:
        """See `PipelineStages`."""
        if name.startswith(f"{self.row.name}."):
            return int(name[len(self.row.name) + 1 :].partition(".")[0]) in self.blocks_of(stage)
        runs = self.row.runs.get(name.rpartition(".")[0], frozenset())
        ends = {BEFORE: stage == 0, AFTER: stage == self.total_stages - 1, AROUND: True}
        return any(ends[each] for each in runs) or (not runs and stage == 0)

    def ties(self) -> dict[str, tuple[int, ...]]:
        """See `PipelineStages`."""
        return self._ties

    def elsewhere(self) -> frozenset[int]:
        """See `PipelineStages`."""
        alive = (each() for each in self._dropped)
        return frozenset(id(param) for param in alive if param is not None)

    # Running ---------------------------------------------------------------------------------------------------------

    def arguments(self, stage: int, received: Any, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See `PipelineStages`."""
        if batch is None:
            raise DataError("a stage of a model that was cut takes the same batches as all others, and has none")
        self._stage, self._received = stage, received
        return call_of(self._model, batch if self.loss_fn is None else _halves(batch)[0])

    def loss_of(self, outputs: Any, batch: Any) -> Any:
        """See `PipelineStages`."""
        if self.loss_fn is not None:
            return self.loss_fn(outputs, _halves(batch)[1])
        if isinstance(outputs, torch.Tensor):
            return outputs
        found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if found is None and isinstance(outputs, tuple):
            found = outputs[0]
        if found is None:
            raise ModelError(
                f"{type(self._model).__name__} gave no loss: put labels into the batch, or give loss_fn to "
                "PipelineModule.from_model"
            )
        return found

    def logits_of(self, outputs: Any) -> Any:
        """See `PipelineStages`."""
        return getattr(outputs, "logits", outputs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, as far as the stage goes."""
        if self._stage is None:
            raise PipelineError(
                f"{type(self._model).__name__} is cut into stages, and this rank has a part of it: run it by "
                "engine.train_batch and engine.eval_batch"
            )
        try:
            with self._active(self._stage):
                return self._forward(*args, **kwargs)
        except _StageEnd as end:
            return end.hidden
        finally:
            self._stage = self._received = None

    @contextmanager
    def _active(self, stage: int) -> Iterator[None]:
        """Puts stand-ins in the place of this rank's blocks of other stages."""
        idle = [at for at in self._own if at not in self.blocks_of(stage)]
        table = self._model.get_submodule(self.row.name)._modules
        for at in idle:
            table[str(at)] = self._stand_ins[at]
        try:
            yield
        finally:
            for at in idle:
                table[str(at)] = self._own[at]

    def _let_pass(self, at: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a block of another stage does."""
        assert self._stage is not None, "only the model's forward runs it"
        own = self.blocks_of(self._stage)
        hidden = hidden_in(self.row.keyword, args, kwargs)
        if at == own.stop:
            raise _StageEnd(hidden)
        if at == own.start - 1:
            hidden = self._received
        return self.row.wrapped(hidden)

    # Cutting ---------------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """See `PipelineStages`."""
        self._undo.clear()

    def restore(self) -> None:
        """See `PipelineStages`."""
        while self._undo:
            self._undo.pop()()

    def _ranks_of(self, path: str) -> set[int]:
        """The ranks on which a module's own parameters are needed."""
        if path.startswith(f"{self.row.name}."):
            at = int(path[len(self.row.name) + 1 :].partition(".")[0])
            stage = next(stage for stage in range(self.total_stages) if at in self.blocks_of(stage))
            return {rank_of_stage(self.schedule, stage, self.num_stages)}
        runs = self.row.runs[path]
        if AROUND in runs:
            return set(range(self.num_stages))
        found = {rank_of_stage(self.schedule, 0, self.num_stages)} if BEFORE in runs or not runs else set()
        if AFTER in runs:
            found.add(rank_of_stage(self.schedule, self.total_stages - 1, self.num_stages))
        return found

    def _find_ties(self) -> dict[str, tuple[int, ...]]:
        ranks: dict[int, set[int]] = {}
        first: dict[int, str] = {}
        blocks: dict[int, set[str]] = {}
        for path, owner in self._model.named_modules():
            for key, param in owner._parameters.items():
                if param is None:
                    continue
                name = f"{path}.{key}" if path else key
                first.setdefault(id(param), name)
                ranks.setdefault(id(param), set()).update(self._ranks_of(path))
                if path.startswith(f"{self.row.name}."):
                    blocks.setdefault(id(param), set()).add(name)
        for key, found in ranks.items():
            if len(found) > 1 and key in blocks:
                raise ModelError(
                    f"{first[key]} is shared by a block and something on another stage "
                    f"({', '.join(sorted(blocks[key]))}): use as few stages as keep them together, or untie it",
                    name=first[key],
                )
        self._needed = ranks
        self._dropped = [
            weakref.ref(param) for param in self._model.parameters() if self.stage_id not in ranks[id(param)]
        ]
        return {first[key]: tuple(sorted(found)) for key, found in ranks.items() if len(found) > 1}

    def _cut(self) -> None:
        row, model = self.row, self._model
        table = model.get_submodule(row.name)._modules
        for at in range(row.count):
            block = row.block(model, at)
            stand_in = _stand_in(block, lambda *args, _at=at, **kwargs: self._let_pass(_at, args, kwargs))
            self._stand_ins.append(stand_in)
            if any(at in self.blocks_of(stage) for stage in self.own_stages):
                self._own[at] = block
            else:
                self._put(table, str(at), stand_in)
        for path, runs in row.runs.items():
            owner = model.get_submodule(path)
            forward = None if AROUND in runs or self.num_stages == 1 else self._elsewhere(path, runs, owner)
            for name, param in list(owner._parameters.items()):
                if param is not None and self.stage_id not in self._needed[id(param)]:
                    self._put(owner._parameters, name, None)
            if forward is not None:
                self._put(owner.__dict__, "forward", forward)
        self._put(model.__dict__, "forward", _named_like(self._forward, self._run))
        if next(model.parameters(), None) is None:
            raise ModelError(f"rank {self.stage_id} of the pipeline has no parameter: use fewer stages")

    def _elsewhere(self, path: str, runs: frozenset[str], owner: nn.Module) -> Callable[..., Any] | None:
        """The forward, on this rank, of a module that runs in other stages than all of the rank's; None to leave it."""
        forward = owner.forward
        if BEFORE in runs:
            if self.own_stages == (0,):
                return None
            form = without_values(owner)

            def before(*args: Any, **kwargs: Any) -> Any:
                if not self._stage:
                    return forward(*args, **kwargs)
                assert self._received is not None, "a later stage has been given something"
                return _zeros(form, args, kwargs, self._received)

            return before
        if (self.total_stages - 1 if runs else 0) in self.own_stages:
            return None

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise PipelineError(
                f"{path} is used in stage {self._stage}, and was not when the model was rehearsed: give an example to "
                "PipelineModule.from_model that is like the batches"
            )

        return refuse

    def _put(self, table: Any, key: str, value: Any) -> None:
        """Sets an entry, and remembers what was there."""
        missing = object()
        before = table.get(key, missing)

        def undo() -> None:
            if before is missing:
                table.pop(key, None)
            else:
                table[key] = before

        table[key] = value
        self._undo.append(undo)


def _stand_in(block: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """A block with all that it says of itself, and nothing that computes."""
    made = copy.copy(block)
    for name, value in list(made.__dict__.items()):
        if isinstance(value, OrderedDict) or name in ("_parameters", "_buffers", "_modules") or name.endswith("_hooks"):
            made.__dict__[name] = type(value)() if isinstance(value, (dict, set)) else value
    made.__dict__["forward"] = forward
    if getattr(made, "gradient_checkpointing", False):
        made.__dict__["gradient_checkpointing"] = False
    made.__dict__[STAND_IN] = True
    return made


def _named_like(forward: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, which scripts that ask for forward's signature take for it."""

    @functools.wraps(forward)
    def stage_forward(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    return stage_forward


def _zeros(form: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], like: torch.Tensor) -> Any:
    """Zeros in the shape of what a module on the meta device gives, in the dtype of `like` and where that is."""

    def lifted(value: Any) -> Any:
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    def filled(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            dtype = like.dtype if value.is_floating_point() else value.dtype
            return torch.zeros(value.shape, dtype=dtype, device=like.device)
        if type(value) in (tuple, list):
            return type(value)(filled(each) for each in value)
        return value

    with torch.no_grad():
        return filled(form(*map(lifted, args), **{key: lifted(each) for key, each in kwargs.items()}))


def _halves(batch: Any) -> tuple[Any, Any]:
    """What the model takes of a batch, and the labels for `loss_fn`."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise DataError(
        f"a batch for loss_fn is a mapping with 'labels', or a pair of what the model takes and labels; got "
        f"{type(batch).__name__}"
    )


def _elements(model: nn.Module, row: Row, when: str) -> int:
    owners = [model.get_submodule(path) for path, runs in row.runs.items() if when in runs]
    params = {id(param): param for owner in owners for param in owner._parameters.values() if param is not None}
    return sum(param.numel() for param in params.values() if param.requires_grad)


def _measured(model: nn.Module, row: Row, example: Any) -> list[float]:
    """Seconds of each block forward, the fastest of some rounds; what runs before and after counts for the ends."""
    if any(param.is_meta for param in model.parameters()):
        raise ModelError("partition 'profile' runs the model on rank 0, and it is on the meta device: use another one")
    stamps: list[float] = []
    blocks = [row.block(model, at) for at in range(row.count)]
    handles = [block.register_forward_pre_hook(lambda *_: stamps.append(time.perf_counter())) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(lambda *_: stamps.append(time.perf_counter())))
    args, kwargs = call_of(model, example_for(model, example))
    best = [float("inf")] * row.count
    try:
        for _ in range(ROUNDS):
            stamps.clear()
            began = time.perf_counter()
            with torch.no_grad():
                model(*args, **kwargs)
            ended = time.perf_counter()
            took = [after - before for before, after in pairwise(stamps)]
            took[0] += stamps[0] - began
            took[-1] += ended - stamps[-1]
            best = list(map(min, best, took))
    finally:
        for handle in handles:
            handle.remove()
    return best

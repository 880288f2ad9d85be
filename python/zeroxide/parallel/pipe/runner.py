"""Follows a rank's order of actions: receives what each needs, has it computed, sends what it gives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from zeroxide.distributed import Ranks
from zeroxide.errors import RanksError
from zeroxide.parallel.pipe.halves import Halves
from zeroxide.parallel.pipe.link import StageLink
from zeroxide.parallel.pipe.message import ACTIVATIONS, GRADIENTS, StageMessage
from zeroxide.parallel.pipe.nesting import flatten, rebuild
from zeroxide.parallel.pipe.schedule import Action, Kind, rank_of_stage

__all__ = ["Compute", "Runner"]


class Compute(Protocol):
    """What computes the stages of a rank."""

    lends_inputs: bool
    """Whether what came from the stage before is to be in memory only as far as the stage's graph keeps it there."""

    def forward(self, stage: int, micro_batch: int, received: Any) -> Any:
        """Runs a stage over what came from the stage before, None for the first. Returns what it gives: the next
        stage's input, or, of the last stage, the loss of the micro-batch as backward begins with it."""

    def backward(
        self,
        stage: int,
        micro_batch: int,
        outputs: list[torch.Tensor | GradientEdge],
        gradients: list[torch.Tensor | None],
    ) -> None:
        """Runs backward from the outputs of a stage, of which each has a gradient; None for a loss."""

    def backward_input(self, stage: int, micro_batch: int, halves: Halves) -> list[torch.Tensor | None]:
        """Runs the first half of a backward. Returns what it gives."""

    def backward_weight(self, stage: int, micro_batch: int, halves: Halves) -> None:
        """Runs the second half."""


@dataclass(slots=True)
class _Pending:
    """What backward of a micro-batch in a stage needs."""

    leaves: list[torch.Tensor] = field(default_factory=list)
    """What came from the stage before and requires a gradient."""
    outputs: list[torch.Tensor | GradientEdge] = field(default_factory=list)
    """What the stage gave and requires a gradient: the loss, or edges of tensors that are not kept."""
    halves: Halves | None = None
    """Backward, where it is computed in two halves and one has run."""


class Runner:
    """One rank's part in a pipeline. `name` is the schedule's, which says where stages are."""

    def __init__(self, name: str, ranks: Ranks, stages: int, link: StageLink, compute: Compute) -> None:
        self._name = name
        self._ranks = ranks
        self._stages = stages
        self._link = link
        self._compute = compute
        self._pending: dict[tuple[int, int], _Pending] = {}
        self._beside: dict[tuple[str, int, int], Any] = {}
        """What goes from one stage of this rank to another."""

    def run(self, order: Iterable[Action]) -> None:
        """Follows the order to its end, and waits until all that was sent has left.

        Raises whatever computing raises, RanksError when a rank is lost.
        """
        try:
            for action in order:
                if action.kind is Kind.FORWARD:
                    self._forward(action.stage, action.micro_batch)
                elif action.kind is Kind.BACKWARD:
                    self._backward(action.stage, action.micro_batch)
                elif action.kind is Kind.BACKWARD_INPUT:
                    self._backward_input(action.stage, action.micro_batch)
                else:
                    self._backward_weight(action.stage, action.micro_batch)
            self._link.drain()
        except BaseException:
            self._link.abandon()
            raise
        finally:
            self._pending.clear()
            self._beside.clear()

    def _forward(self, stage: int, micro_batch: int) -> None:
        received = self._receive(ACTIVATIONS, stage - 1, micro_batch) if stage else None
        leaves = [each for each in flatten(received, "what came")[1] if each.requires_grad]
        if leaves and torch.is_grad_enabled() and self._compute.lends_inputs:
            received = _lent(received)
        given = self._compute.forward(stage, micro_batch, received)
        last = stage == self._stages - 1
        outputs: list[torch.Tensor | GradientEdge] = []
        if torch.is_grad_enabled():
            if last:
                outputs = [given]
            else:
                tensors = flatten(given, f"what stage {stage} gives")[1]
                # What has been sent is not kept for backward, unless a node of the graph keeps it.
                outputs = [get_gradient_edge(each) for each in tensors if each.requires_grad]
            self._pending[stage, micro_batch] = _Pending(leaves, outputs)
        if not last:
            self._give(ACTIVATIONS, stage, micro_batch, stage + 1, given)

    def _backward(self, stage: int, micro_batch: int) -> None:
        pending = self._pending.pop((stage, micro_batch))
        outputs, gradients = self._roots(pending, stage, micro_batch)
        if outputs:
            self._compute.backward(stage, micro_batch, outputs, gradients)
        found = [each.grad for each in pending.leaves]
        for each in pending.leaves:
            each.grad = None
        self._give_gradients(stage, micro_batch, found)

    def _backward_input(self, stage: int, micro_batch: int) -> None:
        pending = self._pending[stage, micro_batch]
        outputs, gradients = self._roots(pending, stage, micro_batch)
        found: list[torch.Tensor | None] = [None] * len(pending.leaves)
        if outputs:
            pending.halves = Halves(outputs, gradients, pending.leaves)
            found = self._compute.backward_input(stage, micro_batch, pending.halves)
        pending.outputs = []
        self._give_gradients(stage, micro_batch, found)

    def _backward_weight(self, stage: int, micro_batch: int) -> None:
        pending = self._pending.pop((stage, micro_batch))
        if pending.halves is not None:
            self._compute.backward_weight(stage, micro_batch, pending.halves)

    def _give_gradients(self, stage: int, micro_batch: int, found: list[torch.Tensor | None]) -> None:
        if stage:
            self._give(GRADIENTS, stage, micro_batch, stage - 1, found)

    def _roots(
        self, pending: _Pending, stage: int, micro_batch: int
    ) -> tuple[list[torch.Tensor | GradientEdge], list[torch.Tensor | None]]:
        """What backward begins with: outputs that have a gradient, and these; None for a loss."""
        gradients: list[torch.Tensor | None] = [None]
        if stage < self._stages - 1:
            gradients = self._receive(GRADIENTS, stage + 1, micro_batch)
            if len(gradients) != len(pending.outputs):
                raise RanksError(
                    f"stage {stage} gave {len(pending.outputs)} tensors that require a gradient, and stage {stage + 1} "
                    f"has {len(gradients)} gradients: ranks follow different schedules"
                )
        wanted = [at for at, each in enumerate(gradients) if each is not None or stage == self._stages - 1]
        return [pending.outputs[at] for at in wanted], [gradients[at] for at in wanted]

    def _receive(self, kind: str, stage: int, micro_batch: int) -> Any:
        source = rank_of_stage(self._name, stage, self._ranks.world)
        if source == self._ranks.rank:
            return self._beside.pop((kind, stage, micro_batch))
        return self._link.receive(StageMessage(kind, stage, micro_batch), source)

    def _give(self, kind: str, stage: int, micro_batch: int, to: int, value: Any) -> None:
        rank = rank_of_stage(self._name, to, self._ranks.world)
        if rank != self._ranks.rank:
            self._link.send(StageMessage(kind, stage, micro_batch), rank, value)
        else:
            self._beside[kind, stage, micro_batch] = value if kind == GRADIENTS else _detached(value)


def _lent(value: Any) -> Any:
    """The value with views in place of the leaves among its tensors that require a gradient.

    The leaves wait for their gradients, and keep their shapes without the memory: that ends with the last view.
    """
    structure, tensors = flatten(value, "what came")
    views = [each.view_as(each) if each.requires_grad else each for each in tensors]
    for each in tensors:
        if each.requires_grad:
            each.data = each.new_empty(()).expand(each.shape)
    return rebuild(structure, views)


def _detached(value: Any) -> Any:
    """The value with leaves in place of its tensors, which require a gradient where those do."""
    structure, tensors = flatten(value, "what a stage gives")
    return rebuild(structure, [each.detach().requires_grad_(each.requires_grad) for each in tensors])

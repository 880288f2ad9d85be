"""Backward in two halves: gradients of what a stage was given first, those of its parameters later.

The first half goes through the graph with torch's own split (`torch.distributed.pipelining`), which remembers what has
arrived where parameters are used (Qi et al. 2024, section 3). The second begins there. torch's second half sets `.grad`
beside autograd, and hooks of parameters hear nothing of it; here it is a backward that accumulates, as any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

__all__ = ["Halves"]


class Halves:
    """Backward of one micro-batch in one stage.

    outputs: what the stage gave, or the loss, whose gradient is None. leaves: what it was given and requires a
    gradient.
    """

    def __init__(
        self,
        outputs: Sequence[torch.Tensor | GradientEdge],
        gradients: Sequence[torch.Tensor | None],
        leaves: Sequence[torch.Tensor],
    ) -> None:
        self._gradients = [_gradient_of(*each) for each in zip(outputs, gradients, strict=True)]
        self._outputs = [each if isinstance(each, GradientEdge) else get_gradient_edge(each) for each in outputs]
        self._leaves = list(leaves)
        self._parameters = _accumulators([each.node for each in self._outputs], self._leaves)
        self._groups: list[dict[str, Any]] | None = None
        """What is left of the graph, by parameters that are used together; None while all of it is."""

    def inputs(self) -> list[torch.Tensor | None]:
        """Gradients of the leaves. What the second half needs is kept."""
        if not self._leaves:
            return []
        # Here, since it imports torch's compiler and sympy: 80 MB for whoever never splits a backward.
        from torch.distributed.pipelining._backward import stage_backward_input

        nodes: list[Any] = [GradientEdge(node, 0) for node in self._parameters]
        found, self._groups = stage_backward_input(
            self._outputs,
            self._gradients,
            self._leaves,
            iter(nodes),
        )
        for leaf in self._leaves:
            leaf.grad = None
        return list(found)

    def weights(self) -> None:
        """Accumulates gradients of the parameters, each once."""
        roots: Any = self._outputs
        if self._groups is None:
            # Nothing was given that requires a gradient: there is one half.
            torch.autograd.backward(roots, self._gradients)
            return
        groups, self._groups = self._groups, []
        known = {node for group in groups for node in group["params"]}
        apart = [param for node, param in self._parameters.items() if node not in known]
        if apart:
            # On no way from what was given.
            torch.autograd.backward(roots, self._gradients, inputs=apart, retain_graph=True)
        for group in groups:
            self._accumulate(group)

    def _accumulate(self, group: dict[str, Any]) -> None:
        if "grads" not in group:
            return
        edges: list[GradientEdge] = []
        arrived: list[torch.Tensor] = []
        for node, gradients in zip(group["intermediates"], group["grads"], strict=True):
            for at, gradient in enumerate(gradients or ()):
                if gradient is not None:
                    edges.append(GradientEdge(node, at))
                    arrived.append(gradient)
        # What a node gets by way of another of the group has arrived there already.
        handles = [
            node.register_prehook(lambda _, known=gradients: known)
            for node, gradients in zip(group["intermediates"], group["grads"], strict=True)
            if len(group["intermediates"]) > 1 and gradients is not None
        ]
        parameters = [self._parameters[node] for node in group["params"]]
        try:
            # A node may be on the way to parameters of several groups. What it keeps ends with the graph.
            torch.autograd.backward(edges, arrived, inputs=parameters, retain_graph=True)
        finally:
            for handle in handles:
                handle.remove()
            group.clear()


def _gradient_of(output: torch.Tensor | GradientEdge, gradient: torch.Tensor | None) -> torch.Tensor:
    if gradient is not None:
        return gradient
    assert isinstance(output, torch.Tensor), "only a loss has no gradient of its own"
    return torch.ones_like(output)


def _accumulators(roots: Sequence[Node], leaves: Sequence[torch.Tensor]) -> dict[Node, torch.Tensor]:
    """The nodes of the graph that accumulate into parameters, and those."""
    given = {id(each) for each in leaves}
    found: dict[Node, torch.Tensor] = {}
    seen: set[Node] = set()
    left: list[Node | None] = list(roots)
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in given:
            found[node] = variable
        left.extend(each for each, _ in node.next_functions)
    return found

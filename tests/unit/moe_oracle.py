"""Layers of experts written from the papers with the dense one-hot of tokens x experts x capacity, in float64.

Switch (arXiv 2101.03961, section 2.2) and GShard (arXiv 2006.16668, algorithm 1). Loops over tokens decide who stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Priority = Callable[[int, int, int], float]
"""(token, choice, expert) -> the smaller, the earlier it takes its place."""


def dense_moe(
    tokens: torch.Tensor,
    gate: torch.Tensor,
    expert: Callable[[int, torch.Tensor], torch.Tensor],
    chosen: list[list[int]],
    capacity: float,
    priority: Priority,
    *,
    normalise: bool,
) -> torch.Tensor:
    """What the layer makes of `tokens`, (tokens, width), float64, when token t chooses experts `chosen[t]`."""
    number = gate.shape[0]
    probabilities = torch.softmax(tokens @ gate.t(), 1)
    places = queue(chosen, number, priority)
    room = max(1, *(place + 1 for place in places.values())) if places else 1
    room = room if math.isinf(capacity) else int(capacity)
    one_hot = torch.zeros(len(chosen), number, max(1, room), dtype=torch.float64)
    for (token, expert_number), place in places.items():
        if place < room:
            one_hot[token, expert_number, place] = 1
    combined = probabilities[:, :, None] * one_hot
    if normalise:
        total = combined.sum((1, 2), keepdim=True)
        combined = torch.where(total > 0, combined / total.clamp(min=torch.finfo(torch.float64).tiny), combined)
    given = torch.einsum("sec,sm->ecm", one_hot, tokens)
    made = torch.stack([expert(each, given[each]) for each in range(number)])
    return torch.einsum("sec,ecm->sm", combined, made)


def queue(chosen: list[list[int]], number: int, priority: Priority) -> dict[tuple[int, int], int]:
    """The place of each (token, expert) in the expert's queue."""
    found = {}
    for expert in range(number):
        waiting = [
            (priority(token, choice, expert), token)
            for token, choices in enumerate(chosen)
            for choice, wanted in enumerate(choices)
            if wanted == expert
        ]
        for place, (_, token) in enumerate(sorted(waiting)):
            found[token, expert] = place
    return found


def balance(probabilities: torch.Tensor, chosen: list[list[int]], k: int) -> torch.Tensor:
    """GShard's auxiliary loss: experts times the sum of (mean probability * share of tokens) / k."""
    tokens, number = probabilities.shape
    share = torch.zeros(number, dtype=torch.float64)
    for choices in chosen:
        for expert in choices[:k]:
            share[expert] += 1 / tokens
    return number * (probabilities.mean(0) * share).sum() / k

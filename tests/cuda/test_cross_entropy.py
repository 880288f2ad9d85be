"""Cross-entropy by chunks of the vocabulary: torch's losses and gradients, however it is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from emulated import Emulator

from zeroxide.errors import TensorError
from zeroxide.kernels.cross_entropy import FP32_TOLERANCE, RowSums, add_chunk, gradient_to


@pytest.mark.parametrize("edges", [[0, 1000], [0, 1, 513, 1000], [0, 8, 16, 1000]])
def test_losses_and_gradients_are_those_of_torch(libraries, edges):
    """Mean over the rows that count. Catches: a target looked for in the wrong chunk, a row that counts too often."""
    logits = (4 * torch.randn(9, 1000, generator=torch.Generator().manual_seed(6))).requires_grad_()
    targets = torch.tensor([0, 999, 7, -100, 512, 513, 1, 8, -100])
    expected = torch.nn.functional.cross_entropy(logits.double(), targets)
    expected.backward()
    chunks = [(low, logits.detach()[:, low:high].contiguous()) for low, high in pairwise(edges)]
    sums = RowSums.empty(9, torch.device("cpu"))
    for first, chunk in chunks:
        add_chunk(Emulator(libraries), sums, chunk, first, targets)
    losses = sums.losses(targets)
    assert losses[3] == losses[8] == 0
    assert abs(losses.sum().item() / 7 - expected.item()) <= FP32_TOLERANCE * losses.max().item()
    scale = torch.where(targets < 0, 0.0, 1 / 7)
    for first, chunk in chunks:
        gradient_to(Emulator(libraries), chunk, chunk, first, targets, sums, scale)
    got = torch.cat([chunk for _, chunk in chunks], 1)
    assert ((got - logits.grad).abs() <= FP32_TOLERANCE * logits.grad.abs().max()).all()
    assert (got[3] == 0).all()


def test_large_logits_and_none_at_all(libraries):
    logits = torch.full((3, 20), -torch.inf)
    logits[0] = 1e30
    logits[1, 4] = 0.0
    logits[2] = torch.nan
    sums, targets = RowSums.empty(3, torch.device("cpu")), torch.tensor([3, 4, 0])
    add_chunk(Emulator(libraries), sums, logits, 0, targets)
    losses = sums.losses(targets)
    assert abs(losses[0].item() - torch.tensor(20.0).log().item()) <= 2.0**-20
    assert losses[1] == 0
    assert losses[2].isnan()


def test_refusals():
    sums, targets = RowSums.empty(2, torch.device("cpu")), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TensorError, match="add_chunk: logits has 1 dimensions: expected 2 dimensions"):
        add_chunk(None, sums, torch.ones(4), 0, targets)
    with pytest.raises(TensorError, match="add_chunk: targets is of 2 elements: expected a tensor of 3 elements"):
        add_chunk(None, sums, torch.ones(3, 4), 0, targets)
    with pytest.raises(TensorError, match="gradient_to: gradients is float16: expected float32"):
        gradient_to(None, torch.ones(2, 4).half(), torch.ones(2, 4), 0, targets, sums, torch.ones(2))

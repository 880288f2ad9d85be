"""Tokens in the order of their experts, and what comes back."""

from __future__ import annotations

import pytest
import torch
from emulated import RANDOM, Emulator

from zeroxide.errors import TensorError
from zeroxide.kernels.permute import combine_rows, expert_order, gather_rows


def test_there_and_back(libraries):
    """Experts that return what they are given: the weighted sum of copies is the token, where weights come to 1."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(33, 40, generator=generator)
    experts = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(33)])
    sources, positions = expert_order(experts)
    rows = gather_rows(Emulator(libraries, RANDOM), tokens, sources)
    # Rows are sorted by expert, and within one in the order of tokens.
    of_rows = experts.view(-1)[torch.argsort(positions.view(-1))]
    assert (of_rows.diff() >= 0).all()
    assert all((sources[of_rows == expert].diff() >= 0).all() for expert in range(5))
    weights = torch.tensor([0.25, 0.75]).expand(33, 2).contiguous()
    back = combine_rows(Emulator(libraries, RANDOM), rows, positions, weights)
    # Two products and a sum of them, each rounded once.
    assert ((back - tokens).abs() <= tokens.abs() * 3 * 2.0**-24).all()


def test_dropped_tokens(libraries):
    experts = torch.tensor([[1, -1], [-1, -1], [0, 1]])
    sources, positions = expert_order(experts)
    assert sources.tolist() == [2, 0, 2]
    assert positions.tolist() == [[1, -1], [-1, -1], [0, 2]]
    rows = torch.arange(6.0).view(3, 2)
    assert combine_rows(Emulator(libraries), rows, positions).tolist() == [[2, 3], [0, 0], [4, 6]]


def test_refusals():
    rows, index = torch.ones(4, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TensorError, match="gather_rows: rows has 1 dimensions: expected 2"):
        gather_rows(None, rows.view(-1), index)
    with pytest.raises(TensorError, match="gather_rows: sources is int32: expected int64"):
        gather_rows(None, rows, index.int())
    with pytest.raises(TensorError, match="combine_rows: weights is of 3 elements: expected a tensor of 4 elements"):
        combine_rows(None, rows, index.view(2, 2), torch.ones(3))

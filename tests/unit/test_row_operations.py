"""What is computed of a matrix a block of rows at a time, without an engine: against torch, of all of it."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from zeroxide.losses import linear_cross_entropy
from zeroxide.rows import blocks_of, cut_rows
from zeroxide.rows.cut import block_ends

ROWS, WIDTH = 300, 8
LIMIT = 128 * WIDTH * 8
"""Bytes of 128 rows in double precision: three blocks."""


class Pair(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64, **more: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(ROWS, WIDTH, dtype=dtype, **more)
        self.head = nn.Linear(WIDTH, ROWS, dtype=dtype)


def cut(model: nn.Module, limit: int = LIMIT, itemsize: int = 8) -> Any:
    found = copy.deepcopy(model)
    cut_rows(found, limit, itemsize)
    return found


def gradient(module: nn.Module) -> torch.Tensor:
    """Of the weight, put together; zero in blocks that were not used."""
    blocks = blocks_of(module)
    if blocks is None:
        found = module.weight.grad
        return found.to_dense() if found.is_sparse else found
    parts = [each.weight.grad for each in blocks]
    dense = [
        torch.zeros_like(block.weight) if part is None else part.to_dense() if part.is_sparse else part
        for block, part in zip(blocks, parts, strict=True)
    ]
    return torch.cat(dense)


@pytest.mark.parametrize(
    "more", [{}, {"padding_idx": 200}, {"padding_idx": -1}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str
)
def test_rows_are_looked_up_exactly(more: dict[str, Any]) -> None:
    """Bits of rows and of their gradients: a row's summands come in the order of the ids, whatever block it is in.
    Catches: ids sorted in another order than they came, frequencies or padding of another block."""
    plain = Pair(**more)
    mine = cut(plain)
    ids = torch.randint(0, ROWS, (5, 40), generator=torch.Generator().manual_seed(1))
    ids[0, :6] = torch.tensor([200, 0, 299, 127, 128, 200])
    factors = torch.randn(5, 40, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for given in (ids, ids.int(), ids % 10, ids[0, 0]):
        for module in (plain, mine):
            module.zero_grad()
            found = module.wte(given)
            (found * (factors if given.dim() else factors[0, 0])).sum().backward()
        assert torch.equal(mine.wte(given), plain.wte(given))
        assert torch.equal(gradient(mine.wte), gradient(plain.wte))


def test_a_projection_and_its_gradients_are_torchs() -> None:
    """Double precision: at most 300 products of numbers below 5, 300 * 25 * 2^-53 < 1e-12. Catches: blocks in another
    order, a bias of another block, a block left out of a sum."""
    plain = Pair()
    mine = cut(plain)
    factors = torch.randn(7, ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = []
    for module in (plain, mine):
        x = torch.randn(7, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        logits = module.head(x)
        (logits * factors).sum().backward()
        found.append((logits, x.grad, gradient(module.head), module.head.bias.grad))
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_the_gradient_of_the_input_is_summed_in_fp32() -> None:
    """Parts of 256 and then 0.5 each are 264 in bf16, and 256 where each sum is rounded to it: its numbers there are 2
    apart. Catches: what autograd does of itself, and parts added in bf16 by the loss."""
    blocks, width = 16, 1
    head = nn.Linear(width, 64 * blocks, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[::64] = 0.5
        # The first in backward.
        head.weight[64 * (blocks - 1)] = 256.0
    model = nn.ModuleDict({"wte": nn.Embedding(64 * blocks, width), "head": head})
    cut_rows(model, 64 * 2 * width, 2)
    assert len(blocks_of(head)) == blocks
    x = torch.ones(2, width, dtype=torch.bfloat16, requires_grad=True)
    head(x).sum().backward()
    assert x.grad.flatten().tolist() == [264.0, 264.0]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("columns", [50, 128, 1000])
def test_cross_entropy_is_torchs(columns: int, reduction: str) -> None:
    """Sums over the vocabulary are fp32: of 300 terms of one sign at most 300 roundings of 2^-24, 2e-5, and as much
    again for exp and log. Catches: a target looked up in another block, blocks whose sums are not those of all, what is
    ignored and counts."""
    plain = Pair()
    mine = cut(plain)
    target = torch.randint(0, ROWS, (4, 6), generator=torch.Generator().manual_seed(3))
    target[0, :3] = torch.tensor([-100, 0, ROWS - 1])
    found = []
    for module in (plain, mine):
        x = torch.randn(4, 6, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if module is plain:
            logits = module.head(x).flatten(0, 1)
            loss = functional.cross_entropy(logits, target.flatten(), reduction=reduction)
            loss = loss.view(target.shape) if reduction == "none" else loss
        else:
            weight, bias = module.head.weight, module.head.bias
            loss = linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction, columns=columns)
        (loss.double() * torch.arange(1, loss.numel() + 1).view(loss.shape)).sum().backward()
        found.append((loss.double(), x.grad, gradient(module.head), module.head.bias.grad))
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_blocks_are_few_of_nearly_one_size() -> None:
    """Catches: a limit that a block exceeds, rows that no block or two have, a last block of a single row."""
    for count in (64, 65, 127, 128, 129, 300, 1000, 50257):
        for most in (64, 128, 192, 448, 4096):
            ends = block_ends(count, most)
            sizes = [end - first for first, end in pairwise(ends)]
            assert ends[0] == 0
            assert sum(sizes) == count
            assert all(0 < size <= most for size in sizes)
            assert all(first % 64 == 0 for first in ends[:-1])
            assert most == 64 or min(sizes) >= min(count, 64)
            assert len(sizes) <= -(-count // most) + 1 or most == 64


def test_copies_and_pickles_of_a_model_in_blocks_are_models_in_blocks() -> None:
    """Catches: a copy that looks up the rows of the first, or has its own twice."""
    model = Pair()
    model.head.weight = model.wte.weight
    model = cut(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.head.weight.blocks is blocks_of(again.wte) is blocks_of(again.head)
        with torch.no_grad():
            blocks_of(model.wte)[0].weight.zero_()
            assert again.wte(torch.tensor([1])).abs().sum() > 0

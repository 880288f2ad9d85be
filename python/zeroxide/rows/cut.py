"""Which matrices of a model are cut by rows, and what becomes of them.

Those are the weights of embeddings, and of linear layers that project onto a vocabulary: ones that share the weight of
an embedding, or have as many outputs as one has rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from zeroxide.device.placement import has_values
from zeroxide.errors import ConfigError, ModelError
from zeroxide.params.handle import handle_of
from zeroxide.rows.block import BLOCKS, WEIGHT, RowBlock, RowBlocks, RowRange
from zeroxide.rows.weight import CutWeight

__all__ = ["ALIGNED", "CutMatrix", "block_ends", "cut_matrix", "cut_rows"]

ALIGNED = 64
"""Rows of a block are a multiple of it, but for the last: then blocks begin where those of any state format do."""


@dataclass(frozen=True)
class CutMatrix:
    """A matrix that is cut."""

    param: nn.Parameter
    """What the model had."""
    owners: tuple[nn.Module, ...]
    """The modules that had it as their weight."""
    blocks: RowBlocks

    def params(self) -> list[nn.Parameter]:
        """The parameters that stand in its place at present."""
        return [dict.__getitem__(block._parameters, WEIGHT) for block in self.blocks]  # type: ignore[misc]


def cut_rows(module: nn.Module, limit: int, itemsize: int) -> list[CutMatrix]:
    """Cuts the matrices of `module` that take more than `limit` bytes at `itemsize` bytes an element, in place. What
    the parameters have moves into the blocks: they are views of it.

    Raises ModelError, before anything is cut, for a matrix that must not be, and ConfigError for a limit that has no
    room for `ALIGNED` rows.
    """
    wanted = _wanted(module, limit, itemsize)
    for name, param, _ in wanted:
        least = ALIGNED * param.shape[1] * itemsize
        if least > limit:
            raise ConfigError(
                f"zeroxide.row_bytes = {limit} is less than {ALIGNED} rows of {name}, which take {least}: give at "
                "least that",
                path="zeroxide.row_bytes",
                expected=f"at least {least}",
                got=str(limit),
            )
    return [
        cut_matrix(name, param, owners, limit // (param.shape[1] * itemsize) // ALIGNED * ALIGNED)
        for name, param, owners in wanted
    ]


def cut_matrix(name: str, param: nn.Parameter, owners: Sequence[nn.Module], rows: int) -> CutMatrix:
    """Cuts the weight `param` of `owners` into blocks of at most `rows` rows, a multiple of `ALIGNED`."""
    shape = tuple(param.shape)
    blocks = []
    for first, end in pairwise(block_ends(shape[0], rows)):
        part = nn.Parameter(torch.empty(0, dtype=param.dtype, device=param.device), requires_grad=param.requires_grad)
        # So it has a version of its own, which views of one tensor share.
        part.data = param.detach()[first:end]
        part.__dict__.update(param.__dict__)
        blocks.append(RowBlock(part, RowRange(shape, first, end)))
    found = RowBlocks(name, shape, blocks)
    weight = CutWeight.of(found)
    for owner in owners:
        del owner._parameters[WEIGHT]
        owner.add_module(BLOCKS, found)
        owner.__dict__[WEIGHT] = weight
    if has_values(param):
        # Blocks share its memory, which goes with the last of them.
        param.data = torch.empty(0, dtype=param.dtype, device=param.device)
    return CutMatrix(param, tuple(owners), found)


def block_ends(count: int, most: int) -> list[int]:
    """Where blocks of `count` rows begin and end: as few as it takes, of nearly one size. A product with few rows is
    another function's, with sums in another order; only where `most` leaves no room for the rest is that a block."""
    full = count // ALIGNED
    for blocks in range(-(-count // most), full + 1):
        ends = [-(-full * number // blocks) * ALIGNED for number in range(blocks)] + [count]
        if max(end - first for first, end in pairwise(ends)) <= most:
            return ends
    return [*range(0, count, ALIGNED), count]


def _wanted(module: nn.Module, limit: int, itemsize: int) -> list[tuple[str, nn.Parameter, list[nn.Module]]]:
    """(name, parameter, modules that have it as their weight) of all that is to be cut."""
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, owner in module.named_modules():
        for key, param in owner._parameters.items():
            if param is not None:
                owners.setdefault(id(param), []).append((f"{prefix}.{key}" if prefix else key, owner, key))
    embeddings = [each for each in module.modules() if isinstance(each, nn.Embedding)]
    rows = {each.num_embeddings for each in embeddings}
    heads = [each for each in module.modules() if isinstance(each, nn.Linear) and each.out_features in rows]
    found: list[tuple[str, nn.Parameter, list[nn.Module]]] = []
    seen: set[int] = set()
    for each in [*embeddings, *heads]:
        param = each._parameters.get(WEIGHT)
        if param is None or id(param) in seen or _bytes(param, itemsize) <= limit:
            continue
        seen.add(id(param))
        name = owners[id(param)][0][0]
        _check(name, param, owners[id(param)])
        found.append((name, param, [owner for _, owner, _ in owners[id(param)]]))
    return found


def _bytes(param: nn.Parameter, itemsize: int) -> int:
    handle = handle_of(param)
    shape = param.shape if handle is None else handle.shape
    return shape.numel() * (itemsize if param.requires_grad else max(itemsize, param.dtype.itemsize))


def _check(name: str, param: nn.Parameter, owners: list[tuple[str, nn.Module, str]]) -> None:
    """Raises ModelError for a matrix that must stay in one piece."""
    why = None
    for other, owner, key in owners:
        if not isinstance(owner, (nn.Embedding, nn.Linear)) or key != WEIGHT:
            why = f"is {other} as well, of a {type(owner).__name__}, which is neither embedding nor linear layer"
        elif isinstance(owner, nn.Embedding) and owner.max_norm is not None:
            why = "is of an embedding with max_norm, which changes rows as it looks them up"
    if handle_of(param) is not None:
        why = "was made inside zeroxide.zero.Init, which has it in slices: build the model on the meta device, or plain"
    elif type(param) is not nn.Parameter or not param.dtype.is_floating_point or param.dim() != 2:
        why = f"is a {type(param).__name__} of {param.dtype}, and no plain matrix of floating-point numbers"
    elif param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None):
        why = "has hooks of its own, which would see a block of its gradient"
    if why is not None:
        raise ModelError(
            f"zeroxide.row_bytes: {name} takes more, and cannot be cut by rows: it {why}; change that, or give more "
            "bytes",
            name=name,
        )

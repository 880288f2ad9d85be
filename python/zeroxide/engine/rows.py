"""A model whose vocabulary's matrices are cut by rows, from what the caller gives to what an engine trains.

From the time it is cut, everything of an engine sees smaller parameters. Weights that are made for a model on the meta
device are asked for under the names and in the shapes of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from zeroxide.config import Config
from zeroxide.device.placement import HOST
from zeroxide.errors import ConfigError
from zeroxide.precision.policy import torch_dtype
from zeroxide.rows import BLOCKS, CutMatrix, RowRange, cut_rows
from zeroxide.zero.init.materialize import PieceSource, WeightSource
from zeroxide.zero.names import own_name, plain_name
from zeroxide.zero.undo import Undo

__all__ = ["CutVocabulary", "cut_by_config", "cut_vocabulary"]


class CutVocabulary:
    """What was cut of a model by rows, if anything."""

    def __init__(self, found: Sequence[CutMatrix]) -> None:
        self.found = found

    def replaced(self) -> Mapping[int, Sequence[nn.Parameter]]:
        """By the ids of parameters that were cut, those that stand in their place."""
        return {id(each.param): each.params() for each in self.found}

    def source(self, weights: WeightSource | None) -> WeightSource | None:
        """What makes the blocks of weights on the meta device, where `weights` makes the matrices."""
        if weights is None or not self.found:
            return weights
        return _PiecesInRows(weights, self.found) if isinstance(weights, PieceSource) else _InRows(weights, self.found)

    def rejoin(self) -> None:
        """Puts the matrices back into the model with the values that their blocks show, once no engine has them."""
        for each in self.found:
            blocks = each.params()
            with torch.no_grad():
                each.param.data = torch.cat([block.detach() for block in blocks])
            for owner in each.owners:
                owner._modules.pop(BLOCKS, None)
                owner.__dict__.pop("weight", None)
                owner._parameters = {"weight": each.param, **owner._parameters}


def cut_by_config(module: nn.Module, config: Config) -> list[CutMatrix]:
    """Cuts what the config has cut by rows, in place. Raises ConfigError and ModelError for what cannot be."""
    limit = config.zeroxide.row_bytes
    if limit is None:
        return []
    mesh = config.mesh
    if config.pipeline is not None or (mesh is not None and (mesh.tp > 1 or mesh.pp > 1)):
        raise ConfigError(
            "zeroxide.row_bytes: cutting by rows where tensor-parallel ranks or stages of a pipeline share the model "
            "is not built: leave it out",
            path="zeroxide.row_bytes",
        )
    return cut_rows(module, limit, torch_dtype(config.precision.dtype).itemsize)


def cut_vocabulary(module: nn.Module, config: Config, world: int, undo: Undo) -> CutVocabulary:
    """Cuts the matrices of `module` that `zeroxide.row_bytes` has cut, in place; `undo` gives them back.

    world: ranks that gather weights together. Raises what `cut_by_config` does.
    """
    found = cut_by_config(module, config)
    own = config.zeroxide
    # What waits for all gradients of a unit must not wait for those of a block that nobody used.
    waits = own.update_in_backward or own.accumulation_order == "layers"
    for each in found:
        if own.update_in_backward and len(each.owners) > 1:
            raise ConfigError(
                f"zeroxide.row_bytes: {each.blocks.name} is the weight of {len(each.owners)} modules, so that "
                "gradients of its blocks are complete only when backward ends, and zeroxide.update_in_backward leaves "
                "them no room until then: leave one of the two out",
                path="zeroxide.row_bytes",
            )
        each.blocks.every = world > 1 or waits
        undo.cut(each.param, each.params())
    return CutVocabulary(found)


class _InRows:
    """Makes blocks of rows out of what another source makes: of a matrix all of it, which is kept until its last block
    has been made."""

    def __init__(self, weights: Any, found: Sequence[CutMatrix]) -> None:
        self.weights = weights
        self.found = {each.blocks.name: each for each in found}
        self.full: dict[str, torch.Tensor] = {}
        """By its name, a matrix that has been made."""

    def rows(self, name: str) -> tuple[str, RowRange] | None:
        """The name of the matrix that a parameter is a block of, and which rows; None for another parameter."""
        plain = plain_name(name)
        found = self.found.get(plain)
        if found is None or plain == own_name(name):
            return None
        number = int(name.rsplit(".", 2)[1])
        return plain, found.blocks[number].rows  # type: ignore[return-value]

    def fill(self, tensors: dict[str, torch.Tensor], modules: dict[str, nn.Module]) -> None:
        """See `WeightSource`."""
        own = dict(tensors)
        blocks: list[tuple[torch.Tensor, str, RowRange]] = []
        for name in tensors:
            if (found := self.rows(name)) is not None:
                blocks.append((own.pop(name), *found))
        left = {name: each for name, each in modules.items() if BLOCKS not in name.split(".")}
        if own or left or not tensors:
            self.weights.fill(own, left)
        for tensor, name, rows in blocks:
            if name not in self.full:
                self.full[name] = self._make(name, rows, tensor.dtype, with_modules=bool(modules))
            tensor.copy_(self.full[name][rows.first : rows.end])
            if rows.end == rows.shape[0]:
                del self.full[name]

    def _make(self, name: str, rows: RowRange, dtype: torch.dtype, *, with_modules: bool) -> torch.Tensor:
        """All of a matrix; its modules have it as their weight meanwhile."""
        full = nn.Parameter(torch.zeros(rows.shape, dtype=dtype, device=HOST), requires_grad=False)
        owners = self.found[name].owners if with_modules else ()
        before = [(owner, owner.__dict__.pop("weight"), owner._parameters) for owner in owners]
        try:
            for owner in owners:
                owner._parameters = {**owner._parameters, "weight": full}
            place = name.rpartition(".")[0]
            self.weights.fill({name: full.data}, {place: owners[0]} if owners else {})
        finally:
            for owner, weight, parameters in before:
                owner._parameters = parameters
                owner.__dict__["weight"] = weight
        return full.data


class _PiecesInRows(_InRows):
    """The same of a source that makes weights in pieces, of which none outlives its turn."""

    def __init__(self, weights: Any, found: Sequence[CutMatrix]) -> None:
        super().__init__(weights, found)
        self.under_way: dict[str, _Pieces] = {}
        """By its name, a matrix of which some blocks have been made."""

    def pieces(self, name: str, shape: torch.Size) -> Iterator[tuple[int, torch.Tensor]]:
        """See `PieceSource`."""
        found = self.rows(name)
        if found is None:
            yield from self.weights.pieces(name, shape)
            return
        plain, rows = found
        known = self.under_way.get(plain)
        if known is None or known.place != rows.start:
            known = self.under_way[plain] = _Pieces(self.weights.pieces(plain, torch.Size(rows.shape)))
        end = rows.start + shape.numel()
        for start, values in known.up_to(end):
            # Of blocks before, where this one is not asked for in its turn.
            skipped = max(0, rows.start - start)
            if skipped < values.numel():
                yield start + skipped - rows.start, values[skipped:]
        if rows.end == rows.shape[0]:
            del self.under_way[plain]


class _Pieces:
    """The values of one matrix, taken a block after the other."""

    def __init__(self, pieces: Iterator[tuple[int, torch.Tensor]]) -> None:
        self.pieces = pieces
        self.place = 0
        """The element that comes next."""
        self.rest: torch.Tensor | None = None

    def up_to(self, end: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(first element, values) from where this is to before element `end`."""
        while self.place < end:
            if self.rest is None:
                found = next(self.pieces, None)
                if found is None or found[0] != self.place:
                    # Whoever asked counts what it was given.
                    return
                self.rest = found[1]
            taken, start = self.rest[: end - self.place], self.place
            self.rest = self.rest[taken.numel() :] if taken.numel() < self.rest.numel() else None
            self.place += taken.numel()
            yield start, taken

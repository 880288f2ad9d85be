"""A model whose vocabulary's matrices are cut by rows, from what the caller gives to what an engine trains.

From the time it is cut, everything of an engine sees smaller parameters. Weights that are made for a model on the meta
device are asked for under the names and in the shapes of the model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import nn

from zeroxide.config import Config
from zeroxide.device.placement import HOST
from zeroxide.errors import ConfigError, ModelError
from zeroxide.precision.policy import torch_dtype
from zeroxide.rows import BLOCKS, WEIGHT, CutMatrix, RowRange, cut_rows
from zeroxide.zero.hook_handle import Method
from zeroxide.zero.init.materialize import PieceSource, WeightSource
from zeroxide.zero.names import own_name, plain_name
from zeroxide.zero.undo import Undo

__all__ = ["CutVocabulary", "cut_by_config", "cut_vocabulary"]


class CutVocabulary:
    """What was cut of a model by rows, if anything."""

    def __init__(self, found: Sequence[CutMatrix], methods: Sequence[Method]) -> None:
        self.found = found
        self.methods = methods

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
        for method in self.methods:
            method.take_off()
        for each in self.found:
            blocks = each.params()
            with torch.no_grad():
                each.param.data = torch.cat([block.detach() for block in blocks])
            for owner in each.owners:
                owner._modules.pop(BLOCKS, None)
                owner.__dict__.pop(WEIGHT, None)
                owner._parameters = {WEIGHT: each.param, **owner._parameters}


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
    early = own.update_in_backward is True
    waits = early or own.accumulation_order == "layers"
    for each in found:
        if early and len(each.owners) > 1:
            raise ConfigError(
                f"zeroxide.row_bytes: {each.blocks.name} is the weight of {len(each.owners)} modules, so that "
                "gradients of its blocks are complete only when backward ends, and zeroxide.update_in_backward leaves "
                "them no room until then: leave one of the two out",
                path="zeroxide.row_bytes",
            )
        each.blocks.every = world > 1 or waits
        undo.cut(each.param, each.params())
    return CutVocabulary(found, list(_methods(module, found)))


def _methods(module: nn.Module, found: Sequence[CutMatrix]) -> Iterator[Method]:
    """Puts methods in the place of those that would look at a matrix itself."""
    for owner in {id(owner): owner for each in found for owner in each.owners}.values():
        yield Method.put(owner, "forward", _uncompiled, ref(owner), owner.__dict__.get("forward"))
    for each in module.modules() if found else ():
        if callable(getattr(type(each), "tie_weights", None)):
            yield Method.put(each, "tie_weights", _check_ties, ref(each))


def _uncompiled(owner: ref[nn.Module], own: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module whose weight is cut: torch.compile ends a graph before it, and begins one after it."""
    module = owner()
    assert module is not None, "it is called through the module"
    act = partial(type(module).forward, module) if own is None else own
    if "torch._dynamo" in sys.modules:
        act = torch.compiler.disable(act)  # type: ignore[no-untyped-call]
    return act(*args, **kwargs)


def _check_ties(owner: ref[Any], *_: Any, **__: Any) -> None:
    """`tie_weights` of transformers' models: matrices that are cut stay as they are shared.

    Raises ModelError where the model's config wants them shared in another way.
    """
    model: Any = owner()
    assert model is not None, "it is called through the model"
    ends = [each() for each in (model.get_input_embeddings, model.get_output_embeddings)]
    weights = [getattr(each, "weight", None) for each in ends]
    tied = weights[0] is not None and weights[0] is weights[1]
    wanted = getattr(model.config, "tie_word_embeddings", tied)
    if all(each is not None for each in weights) and bool(wanted) != tied:
        raise ModelError(
            f"tie_weights: tie_word_embeddings is {wanted} now, and {weights[0]!r} is cut by rows (zeroxide.row_bytes) "
            f"as {'one weight' if tied else 'two weights'} of the model: set it before zeroxide.initialize"
        )


class _InRows:
    """Makes blocks of rows out of what another source makes: of a matrix all of it, which is kept until its last block
    has been made."""

    def __init__(self, weights: Any, found: Sequence[CutMatrix]) -> None:
        self.weights = weights
        self.found = {each.blocks.name: each for each in found}
        self.full: dict[str, torch.Tensor] = {}
        """By its name, a matrix that has been made, and of which blocks are still to be."""
        self.made: set[str] = set()

    def rows(self, name: str) -> tuple[str, RowRange] | None:
        """The name of the matrix that a parameter is a block of, and which rows; None for another parameter."""
        plain = plain_name(name)
        found = self.found.get(plain)
        if found is None or plain == own_name(name):
            return None
        number = int(name.rsplit(".", 2)[1])
        return plain, found.blocks[number].rows  # type: ignore[return-value]

    def fill(self, tensors: dict[str, torch.Tensor], modules: dict[str, nn.Module]) -> None:
        """See `WeightSource`. A matrix is made with the first that is asked for of it and of what its modules have."""
        own = dict(tensors)
        blocks: list[tuple[torch.Tensor, str, RowRange]] = []
        for name in tensors:
            if (found := self.rows(name)) is not None:
                blocks.append((own.pop(name), *found))
        left = {name: each for name, each in modules.items() if BLOCKS not in name.split(".")}
        wanted = {name for _, name, _ in blocks}
        wanted |= {name for name, each in self.found.items() if any(owner in left.values() for owner in each.owners)}
        new = [self.found[name] for name in self.found if name in wanted and name not in self.made]
        for each in new:
            dtype = torch.float32 if each.param.requires_grad else each.param.dtype
            name, full = each.blocks.name, torch.zeros(each.blocks.shape, dtype=dtype, device=HOST)
            self.full[name] = own[name] = full
            if modules:
                left.setdefault(name.rpartition(".")[0], each.owners[0])
        if own or left or not tensors:
            with _uncut(self.found.values(), self.full if modules else {}):
                self.weights.fill(own, left)
        self.made |= {each.blocks.name for each in new}
        for tensor, name, rows in blocks:
            tensor.copy_(self.full[name][rows.first : rows.end])
            if rows.end == rows.shape[0]:
                del self.full[name]


@contextmanager
def _uncut(found: Iterable[CutMatrix], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The modules have their parameters meanwhile, as whoever makes weights knows them: `values` by their names, and
    others on the meta device."""
    before = []
    try:
        for each in found:
            full = values.get(each.blocks.name)
            shown = each.param if full is None else nn.Parameter(full, requires_grad=False)
            for owner in each.owners:
                before.append((owner, owner.__dict__.pop(WEIGHT), owner._modules.pop(BLOCKS), owner._parameters))
                owner._parameters = {WEIGHT: shown, **owner._parameters}
        yield
    finally:
        for owner, weight, blocks, parameters in before:
            owner._parameters, owner._modules[BLOCKS], owner.__dict__[WEIGHT] = parameters, blocks, weight


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
            yield from self._made(self.weights.pieces(name, shape))
            return
        plain, rows = found
        known = self.under_way.get(plain)
        if known is None or known.place != rows.start:
            known = self.under_way[plain] = _Pieces(self._made(self.weights.pieces(plain, torch.Size(rows.shape))))
        end = rows.start + shape.numel()
        for start, values in known.up_to(end):
            # Of blocks before, where this one is not asked for in its turn.
            skipped = max(0, rows.start - start)
            if skipped < values.numel():
                yield start + skipped - rows.start, values[skipped:]
        if rows.end == rows.shape[0]:
            del self.under_way[plain]
            if known.rest is not None or next(known.pieces, None) is not None:
                count = torch.Size(rows.shape).numel()
                raise ModelError(f"pieces of {plain}: expected {count} elements, got more", name=plain)

    def _made(self, pieces: Iterator[tuple[int, torch.Tensor]]) -> Iterator[tuple[int, torch.Tensor]]:
        """The pieces, each made while the modules have their parameters."""
        while True:
            with _uncut(self.found.values(), {}):
                found = next(pieces, None)
            if found is None:
                return
            yield found


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

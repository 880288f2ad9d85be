"""Initial weights into the core, unit by unit, from a real model or for one on the meta device.

A model on the meta device has shapes but no memory. A `WeightSource` fills one unit at a time, so that a model larger
than memory never exists whole. A `PieceSource` gives one parameter after the other in pieces, of which each is gone
before the next comes: then not even a unit exists in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from zeroxide import _core
from zeroxide.device.placement import HOST, has_values, in_host, nothing_like, plain, spec
from zeroxide.distributed import Ranks
from zeroxide.errors import ModelError
from zeroxide.plan.plan import ParameterPlan, UnitPlan
from zeroxide.precision.bits import bytes_of, converted, tensor_of
from zeroxide.zero.buffers import share_buffers
from zeroxide.zero.init.from_files import drop_mapped
from zeroxide.zero.init.slices import slice_of

__all__ = ["PieceSource", "WeightSource", "fill_units", "replace_meta_parameters"]


class WeightSource(Protocol):
    """Where the weights of a model on the meta device come from."""

    def fill(self, tensors: dict[str, torch.Tensor], modules: dict[str, nn.Module]) -> None:
        """Fills one unit in place.

        `tensors` maps full parameter names to CPU tensors, zero at first: fp32 for those that are trained, and frozen
        ones in the dtype that they have on the meta device. `modules` maps full module names to
        the modules that own them, whose parameters and buffers are real during the call. Modules that own only
        buffers come in a last call with no tensors.
        """


@runtime_checkable
class PieceSource(WeightSource, Protocol):
    """A `WeightSource` that also gives the weights of one parameter in pieces, and is then asked for all trained ones.

    Its `fill` is called for frozen parameters, one at a time and without modules, and in the end without tensors for
    all modules that own buffers on the meta device."""

    def pieces(self, name: str, shape: torch.Size) -> Iterator[tuple[int, torch.Tensor]]:
        """The values of the parameter with the full name `name`: (first element, fp32 CPU tensor of one dimension), in
        order and without gaps, each valid until the next is asked for. The same pieces on every rank."""


def replace_meta_parameters(module: nn.Module) -> dict[int, nn.Parameter]:
    """Gives every meta parameter an empty one in host memory in its place, in all its owners.

    Returns the new parameter by the id of the old one. The old shapes are lost: plan first.
    """
    new: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, param in owner._parameters.items():
            if param is None or has_values(param):
                continue
            if id(param) not in new:
                # The old parameter stays alive in the plan, so its id is not given to another object meanwhile.
                made = nn.Parameter(torch.empty(0, dtype=param.dtype, device=HOST), requires_grad=param.requires_grad)
                made.__dict__.update(param.__dict__)
                if type(param) is not nn.Parameter:
                    made.__class__ = type(param)
                new[id(param)] = made
            owner._parameters[name] = new[id(param)]
    return new


def fill_units(
    module: nn.Module,
    plans: list[UnitPlan],
    core: _core.Offload,
    source: WeightSource | None,
    new: dict[int, nn.Parameter],
    ranks: Ranks,
    places: Sequence[Sequence[int]] = (),
) -> None:
    """Moves or makes the weights of every unit: rank 0's. Real parameters lose their memory as they go.

    places: of units of experts, the ranks with each place's; what is made of a place is that of its first rank.
    Raises ModelError when the model is on the meta device and there is no source.
    """
    if new and source is None:
        raise ModelError(
            "the model is on the meta device and has no weights: pass weights=, a WeightSource that makes them"
        )
    seen: set[int] = set()
    for index, plan in enumerate(plans):
        core.fill_begin(index, "weights")
        if new and source is not None:
            _make(index, plan, core, source, new, seen, ranks, places if plan.experts else ())
        else:
            for position, entry in enumerate(plan.params):
                kept = slice_of(entry.param)
                if kept is not None and not kept.full:
                    kept.gather(entry.param)
                    values = _values(entry)
                else:
                    # Of experts every rank has been given rank 0's, before it let go of the others'.
                    values = _values(entry) if entry.expert else ranks.broadcast_tensor(_values(entry))
                _fill(core, index, position, entry, values)
                if kept is not None:
                    # The slice has them still.
                    entry.param.data = nothing_like(entry.param)
        core.fill_commit(index)
        # Not before: should the construction fail, they are in one place or the other.
        for entry in () if new else plan.params:
            kept = slice_of(entry.param)
            if kept is not None:
                kept.drop()
            else:
                _let_go(entry.param)
    if new and source is not None:
        rest = {name: owner for name, owner in module.named_modules() if id(owner) not in seen and _meta_buffers(owner)}
        for owner in rest.values():
            _make_buffers(owner)
        if rest:
            source.fill({}, rest)
    share_buffers(module, ranks)
    ranks.barrier()


def _let_go(param: nn.Parameter) -> None:
    """Empties a parameter whose values are the core's. Where they were mapped from a file, as those of safetensors are
    until the last tensor of the file is gone, the pages leave the process now."""
    drop_mapped(param)
    param.data = nothing_like(param)


def _values(entry: ParameterPlan) -> torch.Tensor:
    """What the core is given of a parameter that shows its values: fp32, or the bytes of a frozen one."""
    if entry.trainable:
        return plain(in_host(entry.param.detach()).to(torch.float32))
    return bytes_of(converted(in_host(entry.param.detach()), entry.dtype))


def _fill(core: _core.Offload, index: int, position: int, entry: ParameterPlan, values: torch.Tensor) -> None:
    flat = spec(values.view(-1))
    if entry.trainable:
        core.fill_param(index, position, 0, flat)
    else:
        core.fill_bytes(index, position, 0, flat)


def _make(
    index: int,
    plan: UnitPlan,
    core: _core.Offload,
    source: WeightSource,
    new: dict[int, nn.Parameter],
    seen: set[int],
    ranks: Ranks,
    places: Sequence[Sequence[int]],
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    modules: dict[str, nn.Module] = {}
    if isinstance(source, PieceSource):
        _make_in_pieces(index, plan, core, source, ranks, places)
        return
    for entry in plan.params:
        param = new[id(entry.param)]
        kind = torch.float32 if entry.trainable else entry.param.dtype
        param.data = tensor_of(
            torch.zeros(entry.shape.numel() * kind.itemsize, dtype=torch.uint8, device=HOST), kind, entry.shape
        )
        tensors[entry.name] = param.data
        modules.update(dict(entry.owners))
    for owner in modules.values():
        seen.add(id(owner))
        _make_buffers(owner)
    source.fill(tensors, modules)
    for position, entry in enumerate(plan.params):
        param = new[id(entry.param)]
        values = param.data.contiguous() if entry.trainable else bytes_of(converted(param.data, entry.dtype))
        _fill(core, index, position, entry, _alike(values, ranks, places))
        param.data = torch.empty(0, dtype=entry.dtype, device=HOST)


def _alike(values: torch.Tensor, ranks: Ranks, places: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rank 0's values, or those of the first rank that has the same experts."""
    if not places:
        return ranks.broadcast_tensor(values)
    for ranks_there in places:
        mine = ranks.rank in ranks_there
        ranks.broadcast_tensor(values if mine else torch.empty_like(values), ranks_there[0])
    return values


def _make_in_pieces(
    index: int,
    plan: UnitPlan,
    core: _core.Offload,
    source: PieceSource,
    ranks: Ranks,
    places: Sequence[Sequence[int]],
) -> None:
    for position, entry in enumerate(plan.params):
        if not entry.trainable:
            kind = entry.param.dtype
            raw = torch.zeros(entry.shape.numel() * kind.itemsize, dtype=torch.uint8, device=HOST)
            tensor = tensor_of(raw, kind, entry.shape)
            source.fill({entry.name: tensor}, {})
            values = bytes_of(converted(tensor, entry.dtype))
            _fill(core, index, position, entry, _alike(values, ranks, places))
            continue
        end = 0
        for start, piece in source.pieces(entry.name, entry.shape):
            if start != end:
                raise ModelError(
                    f"pieces of {entry.name}: expected one from element {end} on, got one from {start} on",
                    name=entry.name,
                )
            end += piece.numel()
            core.fill_param(index, position, start, spec(_alike(piece, ranks, places)))
        if end != entry.numel:
            raise ModelError(f"pieces of {entry.name}: expected {entry.numel} elements, got {end}", name=entry.name)


def _meta_buffers(owner: nn.Module) -> bool:
    return any(buffer is not None and not has_values(buffer) for buffer in owner._buffers.values())


def _make_buffers(owner: nn.Module) -> None:
    for name, buffer in owner._buffers.items():
        if buffer is not None and not has_values(buffer):
            raw = torch.zeros(buffer.numel() * buffer.itemsize, dtype=torch.uint8, device=HOST)
            owner._buffers[name] = tensor_of(raw, buffer.dtype, buffer.shape)

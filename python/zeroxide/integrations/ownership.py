"""Which engine has a module's weights where libraries ask for one engine after another, and how the module gets them
back in between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from zeroxide.device.placement import HOST, has_values
from zeroxide.engine.engine import Engine
from zeroxide.params.empty import reveal
from zeroxide.params.handle import handle_of, unmanage
from zeroxide.precision.bits import FLOATS, bytes_of, why_not_bytes
from zeroxide.zero.param import sharded_param_of

__all__ = ["Ownership", "owner_of"]

_ATTRIBUTE = "_zeroxide_ownership"
_HOOKS = ("_forward_pre_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")


class Ownership:
    """An engine, and what its module's parameters and buffers were before. Made before the engine is, by
    `Ownership.of`."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self._before: dict[str, torch.Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the module is nobody's.
        return Ownership, ()

    @classmethod
    def of(cls, module: nn.Module, *, trains: bool) -> Ownership:
        """Notes what parameters and buffers are. An engine that does not train leaves parameters as they are, so that
        they are kept, unless they are in slices already. Buffers are always kept: an engine may cast and move them."""
        found = cls()
        found._buffers = {(prefix, name): buffer for prefix, _, name, buffer in _buffers_of(module)}
        for name, param in module.named_parameters():
            found._dtypes[name] = param.dtype
            if not trains and handle_of(param) is None:
                found._before[name] = param.data
        return found

    @property
    def has_all(self) -> bool:
        """Whether the module's own tensors are kept, as they were."""
        return len(self._before) == len(self._dtypes)

    def belongs_to(self, module: nn.Module, engine: Engine) -> None:
        """Notes the engine, for whoever asks `owner_of`."""
        self.engine = engine
        module.__dict__[_ATTRIBUTE] = self

    def give_back(self) -> None:
        """Ends the engine; every rank's module has its weights again, exact, in host memory and in their first dtype.

        Buffers come back in their first dtype to where the weights are; those that nothing has changed since the engine
        cast them are the tensors that they were. Every rank calls it, and needs memory for the whole model, unless
        `has_all`.
        """
        engine = self.engine
        if engine is None:
            return
        module = engine.module
        named = list(module.named_parameters())
        values = [self._value(name, param) for name, param in named]
        tables = [getattr(each, name) for each in module.modules() for name in _HOOKS]
        before = [set(table) for table in tables]
        engine.destroy()
        for table, kept in zip(tables, before, strict=True):
            for key in set(table) - kept:
                del table[key]
        for (_, param), value in zip(named, values, strict=True):
            if handle_of(param) is None:
                param.data = value
            else:
                reveal(param, value)
                unmanage(param)
        self._restore_buffers(module)
        self.engine = None
        module.__dict__.pop(_ATTRIBUTE, None)

    def _restore_buffers(self, module: nn.Module) -> None:
        # A buffer of several modules stays one. What the keys are ids of is kept alive by the values.
        made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for prefix, owner, name, buffer in _buffers_of(module):
            before = self._buffers.get((prefix, name))
            if before is not None:
                _, found = made.get(id(buffer)) or (buffer, self._restored(before, buffer))
                made[id(buffer)] = (buffer, found)
                owner._buffers[name] = found

    def _restored(self, before: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        # Weights that are not kept come to host memory, whatever they were on.
        device = before.device if self.has_all else HOST
        if buffer.dtype != before.dtype and not {buffer.dtype, before.dtype} <= {*FLOATS}:
            # The engine casts floating-point numbers alone: the module has made itself another buffer.
            return buffer.to(device)
        return (before if _is_cast_of(buffer, before) else buffer).to(device, before.dtype)

    def _value(self, name: str, param: nn.Parameter) -> torch.Tensor:
        kept = self._before.get(name)
        if kept is not None:
            return kept
        sharded = sharded_param_of(param)
        assert sharded is not None, "the engine has every parameter of its module"
        flat = sharded.read("weights") if sharded.trainable else sharded.read_live()
        return flat.view(sharded.shape).to(HOST, self._dtypes[name])


def _buffers_of(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """(path of its module, the module, name in it, buffer) of every buffer; each may be replaced when it has come."""
    for prefix, owner in module.named_modules():
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                yield prefix, owner, name, buffer


def _is_cast_of(buffer: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether `buffer` is what `before` becomes in its dtype and on its device, bit for bit."""
    if buffer is before:
        return True
    if not has_values(before) or buffer.shape != before.shape or why_not_bytes(buffer) or why_not_bytes(before):
        return False
    cast = before.to(buffer.device).to(buffer.dtype)
    return torch.equal(bytes_of(cast), bytes_of(buffer))


def owner_of(module: nn.Module) -> Ownership | None:
    """The engine that has the module's weights; None where none has, or it has ended."""
    found = module.__dict__.get(_ATTRIBUTE)
    if found is None or found.engine is None or not found.engine.parts.core.alive:
        return None
    assert isinstance(found, Ownership)
    return found

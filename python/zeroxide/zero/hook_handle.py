"""What an engine puts on modules, and what copies of these modules must not have.

A module that is copied or pickled takes everything with it that stands in its `__dict__`: hooks, a `forward` of its
own, changed settings. Those of an engine refer to its memory, which cannot be copied, and say nothing about a module
that owns its parameters. `Hook` is a callable of an engine whose copies do nothing, `Method` replaces one of a module's
methods; `PlainCopies` goes further and leaves all of an engine out of the copies of a model's modules, so that they are
what they would be without one.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from functools import partial
from typing import Any

from torch import nn

from zeroxide.errors import ModelError

__all__ = ["Hook", "Method", "PlainCopies"]

GETSTATE = "__getstate__"
"""Asked of an object by copying and pickling for what is to be copied; an instance may have its own."""


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """What a hook does in a copy."""


class Hook(partial[Any]):
    """`Hook(act, *args)` calls `act` with these arguments and those of the call; copies of it do nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(_nothing)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (_nothing,)

    def disarm(self) -> None:
        """Makes the hook itself do nothing, wherever it is still held, and lets go of what it refers to."""
        self.__setstate__((_nothing, (), {}, None))  # type: ignore[attr-defined]


class Method(Hook):
    """A method of one module that an engine has replaced; copies of the module have the method of its class."""

    module: nn.Module
    name: str
    before: Any

    @classmethod
    def put(cls, module: nn.Module, name: str, act: Any, *args: Any) -> Method:
        """Makes `act(*args, ...)` the module's method `name`."""
        method = cls(act, *args)
        method.module, method.name, method.before = module, name, module.__dict__.get(name)
        module.__dict__[name] = method
        return method

    def take_off(self) -> None:
        """Gives the module its method back."""
        if self.module.__dict__.get(self.name) is not self:
            return
        del self.module.__dict__[self.name]
        if self.before is not None:
            self.module.__dict__[self.name] = self.before

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return getattr(copy.deepcopy(self.module, memo), self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        # Found on the module while that is being made, and so in its class.
        return getattr, (self.module, self.name)


class PlainCopies:
    """Sees to it that copies and pickles of a model's modules have nothing of its engine.

    Shallow copies share their module's parameters, and so keep its hooks for as long as the engine lives. A class that
    says itself how it is copied is left alone; its copies have hooks that do nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.states: list[_State] = []
        for module in model.modules():
            if GETSTATE not in module.__dict__ and not _copies_itself(type(module)):
                state = _State(module)
                module.__dict__[GETSTATE] = state
                self.states.append(state)

    def close(self) -> None:
        """Disarms the engine's hooks, which shallow copies may still hold, and ends. Called before they are removed."""
        for state in self.states:
            module = state.module()
            if module is None:
                continue
            for table in _tables(module.__dict__).values():
                for value in table.values():
                    if isinstance(hook := getattr(value, "hook", value), Hook):
                        hook.disarm()
            if module.__dict__.get(GETSTATE) is state:
                del module.__dict__[GETSTATE]
        self.states.clear()


def _copies_itself(kind: type) -> bool:
    return hasattr(kind, "__deepcopy__") or any(
        getattr(kind, name) is not getattr(object, name) for name in ("__reduce__", "__reduce_ex__")
    )


def _tables(state: dict[str, Any]) -> dict[str, OrderedDict[int, Any]]:
    return {name: value for name, value in state.items() if isinstance(value, OrderedDict)}


class _State:
    """Stands in for the `__getstate__` of one module."""

    def __init__(self, module: nn.Module) -> None:
        # Not the module: it has this object, and a cycle would keep a model's memory until garbage is collected.
        self.module = weakref.ref(module)

    def __call__(self) -> Any:
        module = self.module()
        assert module is not None, "an attribute of the module is called through it"
        state = type(module).__getstate__(module)  # type: ignore[no-untyped-call]
        if not isinstance(state, dict):
            return state
        plain = {name: value for name, value in state.items() if name != GETSTATE and not _is_ours(value)}
        tables = _tables(plain)
        ours = {key for table in tables.values() for key, value in table.items() if _is_ours(value)}
        plain.update((name, _Table(table, ours)) for name, table in tables.items() if not ours.isdisjoint(table))
        return plain

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self.__reduce__()

    def __reduce__(self) -> Any:
        module = self.module()
        raise ModelError(
            f"the __dict__ of {type(module).__name__} was to be copied or pickled, and it belongs to an engine: copy "
            "the module, as with copy.deepcopy(module)"
        )


def _is_ours(value: Any) -> bool:
    # torch wraps some kinds of hooks.
    return isinstance(value, Hook) or isinstance(getattr(value, "hook", None), Hook)


class _Table(OrderedDict[int, Any]):
    """A table of hooks, or of what is known about hooks, under their numbers; copies of it are without `ours`."""

    def __init__(self, table: OrderedDict[int, Any], ours: set[int]) -> None:
        super().__init__(table)
        self.ours = ours

    def _plain(self) -> OrderedDict[int, Any]:
        return OrderedDict((key, value) for key, value in self.items() if key not in self.ours)

    def __deepcopy__(self, memo: dict[int, Any]) -> OrderedDict[int, Any]:
        return copy.deepcopy(self._plain(), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self._plain().items())

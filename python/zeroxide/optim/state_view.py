"""Optimizer state that lies in the core, as the mappings that torch's optimizers have: read when somebody asks.

Nothing is kept here. Each value is read from where the state is and is a copy: pickling, `torch.save` and
`copy.deepcopy` read one value after the other and leave plain dicts of plain tensors, which any process can load
without zeroxide.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch

from zeroxide.device.placement import storage_address
from zeroxide.errors import ModelError

__all__ = ["ParameterState", "StateCopy", "StateView"]


class StateCopy(torch.Tensor):
    """A value as `optimizer.state` shows it. Changing it in place would be lost, and is refused by name."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As for any tensor; results of their own memory are plain. Raises ModelError for an operation in place."""
        name, given = getattr(func, "__name__", ""), kwargs or {}
        writes = (name.endswith("_") and not name.endswith("__")) or name in _WRITES
        written = [given.get("out"), *(_flat(args[:1]) if writes and name != "requires_grad_" else ())]
        if any(isinstance(each, StateCopy) for each in written):
            raise ModelError(
                f"{name} on a value of optimizer.state: it is a copy of what the core holds, and a change would be "
                "lost; use load_state_dict, or zeroxide.safe_set_full_optimizer_state with an engine"
            )
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **given)
            # A view is the copy still: what is written into a row of it would be lost as well.
            shares = (
                isinstance(found, torch.Tensor)
                and bool(args)
                and isinstance(args[0], StateCopy)
                and storage_address(found) == storage_address(args[0])
            )
            return found.as_subclass(StateCopy) if shares else found


def _flat(given: Any) -> Iterator[Any]:
    for each in given:
        yield from _flat(each) if isinstance(each, list | tuple) else (each,)


_WRITES = frozenset(("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"))


class ParameterState(Mapping[str, torch.Tensor]):
    """One parameter's "step", "exp_avg", "exp_avg_sq" and, for weights in low precision, "master": the exact weight.

    `read` gives a part by its name, as a new tensor. `shown`: values refuse to be changed.
    """

    def __init__(self, parts: tuple[str, ...], read: Callable[[str], torch.Tensor], *, shown: bool) -> None:
        self._parts = parts
        self._read = read
        self._shown = shown

    def __getitem__(self, part: str) -> torch.Tensor:
        if part not in self._parts:
            raise KeyError(part)
        value = self._read(part)
        return value.as_subclass(StateCopy) if self._shown else value

    def __setitem__(self, part: str, value: Any) -> NoReturn:
        _refuse(f"optimizer.state[...][{part!r}]")

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        return f"ParameterState({', '.join(self._parts)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter((part, self._read(part)) for part in self._parts)


class StateView(Mapping[Any, ParameterState]):
    """The state of every parameter, by the parameter or by its number."""

    def __init__(self, entries: dict[Any, ParameterState]) -> None:
        self._entries = entries

    def __getitem__(self, key: Any) -> ParameterState:
        return self._entries[key]

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        _refuse("optimizer.state[...]")

    def __delitem__(self, key: Any) -> NoReturn:
        _refuse("optimizer.state[...]")

    def clear(self) -> NoReturn:
        """Refused: raises ModelError."""
        _refuse("optimizer.state")

    def __iter__(self) -> Iterator[Any]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"StateView of {len(self)} parameters"

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self._entries.items())


def _refuse(what: str) -> NoReturn:
    raise ModelError(
        f"{what} cannot be set: the state lies in the core; use load_state_dict, or "
        "zeroxide.safe_set_full_optimizer_state with an engine"
    )

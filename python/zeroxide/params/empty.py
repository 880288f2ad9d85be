"""Parameters while they show no values: an operation that needs the values brings them, or says by name why not.

Modules are not the only ones to use weights. A parent that calls the parts of a block, a module that reads its child's
weight, a projection tied by hand, a penalty on weights: whoever hands an empty parameter to an operation of torch gets
its unit gathered. Python asks the class of an argument what to do (`__torch_function__`), so the class of a parameter
is changed together with what it shows, and operations on parameters that show their values cost what they do in torch.

Inside a pass the unit stays as a guest until the pass ends or its room is needed. Outside of one the result is a copy
where it would be a view of memory that comes and goes, and what would change a parameter is refused: torch changes a
tensor of size 0 without a word. Shapes, dtypes, gradients and hooks are then answered as those of a tensor of size 0.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import repeat
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from zeroxide.errors import ModelError
from zeroxide.params.operations import Need, name_of, need_of, parameters_in

__all__ = ["EmptyData", "ParameterTable", "conceal", "conceal_all", "full_class", "reveal", "reveal_all"]

_set_data: Callable[[torch.Tensor, torch.Tensor], None] = torch._C.TensorBase.data.__set__  # type: ignore[attr-defined]
"""Not as somebody who is handed the memory of a managed parameter."""
_CONVERSIONS = frozenset({"to", "cpu", "float", "half", "bfloat16", "double", "contiguous", "type"})
"""What may leave a parameter as it is."""


class _Empty:
    """A parameter that shows no values; mixed with its class while it shows them."""

    full: type
    _handle: Any

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        need, name = need_of(func, _is_target(first)), name_of(func)
        empty = [each for each in parameters_in((args, kwargs)) if isinstance(each, _Empty)]
        if not empty:
            # Gathering one unit has brought the parameters of another operand as well.
            return func(*args, **kwargs)
        # Only an engine gathers. Slices of zero.Init are gathered by that.
        context = getattr(empty[0]._handle, "context", None)
        inside = context is not None and context.in_pass()
        if need is Need.NOTHING or (need is Need.SHAPE and not inside):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name in _CONVERSIONS and isinstance(first, _Empty) and not inside:
            with torch._C.DisableTorchFunctionSubclass():
                found = func(*args, **kwargs)
            if found is first or not isinstance(found, torch.Tensor):
                return found
            # A module that is cast or moved would put the result in the parameter's place.
            raise _refusal(first, name)
        if name == "detach" and isinstance(first, _Empty) and context is None:
            # A state dict of slices has their names; whoever asks for values of it is told.
            return EmptyData.of(first)
        if name == "data" and isinstance(first, _Empty):
            if len(args) == 1 and context is not None and not inside:
                return EmptyData.of(first)
            if len(args) == 2:
                # What a module does with its parameters when it is moved to where it is.
                if args[1] is first:
                    return None
                raise _refusal(first, name)
        if context is None or (not inside and (need in (Need.CHANGE, Need.ADDRESS) or _writes(kwargs))):
            raise _refusal(empty[0], name)
        # Also those that show their values: room for one must not be another's.
        managed = [each for each in parameters_in((args, kwargs)) if hasattr(each, "_handle")]
        if inside:
            context.use(managed)
            return func(*args, **kwargs)
        with context.apart():
            context.use(managed)
            result = tree_map_only(torch.Tensor, context.own_copy, func(*args, **kwargs))
            recorded = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor) and each.requires_grad]
            context.end_use(recorded)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _filled(self, "copying").__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _filled(self, "pickling").__reduce_ex__(protocol)


class EmptyData(torch.Tensor):
    """`param.data` of an empty parameter: what would change it is refused, and everything else is done with a copy."""

    _param: Any

    @classmethod
    def of(cls, param: Any) -> EmptyData:
        """The data of `param`, which is empty."""
        with torch._C.DisableTorchFunctionSubclass():
            data = torch.empty(0, dtype=param.dtype, device=param.device).as_subclass(cls)
        data._param = param
        return data

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        need = need_of(func, _is_target(args[0] if args else None))
        if need in (Need.NOTHING, Need.SHAPE):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = [each for each in tree_leaves((args, kwargs)) if isinstance(each, EmptyData)]
        foreign = [each for each in found if not each._param._handle.in_engine]
        if foreign or need in (Need.CHANGE, Need.ADDRESS) or _writes(kwargs):
            raise _refusal((foreign or found)[0]._param, name_of(func))

        def values(data: EmptyData) -> torch.Tensor:
            with torch.no_grad():
                shown: torch.Tensor = data._param.detach()
            return shown

        args, kwargs = tree_map_only(EmptyData, values, (args, kwargs))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise _refusal(self._param, "copying")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _refusal(self._param, "pickling")


def _is_target(first: Any) -> bool:
    if isinstance(first, (list, tuple)):
        return any(isinstance(each, (_Empty, EmptyData)) for each in first)
    return isinstance(first, (_Empty, EmptyData))


def _writes(kwargs: dict[str, Any]) -> bool:
    return isinstance(kwargs.get("out"), (_Empty, EmptyData))


def _filled(param: Any, what: str) -> Any:
    """The parameter with its values, where a look at it is enough to bring them: inside zero.Init."""
    with suppress(ModelError):
        _ = param.data
    if isinstance(param, _Empty):
        raise _refusal(param, what)
    return param


def _refusal(param: Any, what: str) -> ModelError:
    handle = param._handle
    elsewhere = "; state_dict() has them anywhere" if handle.in_engine else ""
    return ModelError(
        f"{handle.name} {tuple(handle.shape)} is empty, and {what} needs its values: they are there while its module "
        "runs forward or backward, and inside zeroxide.zero.GatheredParameters, with modifier_rank=0 to change them"
        f"{elsewhere}",
        name=handle.name,
    )


class ParameterTable(dict[str, Any]):
    """`_parameters` of a module at stage 3: a parameter that is asked for by name in a pass is about to be used.

    So also what torch does not ask a class about finds values: functions of autograd, fast paths, looks at a shape.
    """

    def __init__(self, table: Mapping[str, Any], moves: bool) -> None:
        super().__init__(table)
        self.moves = moves
        """Whether reads do not bring weights that a parameter shows without having them, as it may in backward."""

    def __getitem__(self, name: str) -> Any:
        # Every look of a module at one of its parameters comes by here.
        found = dict.__getitem__(self, name)
        if self.moves or isinstance(found, _Empty):
            handle = getattr(found, "_handle", None)
            if handle is not None:
                handle.touch(found)
        return found

    def items(self) -> Any:
        """Parameters that are listed in a pass may be handed to functions of autograd while they are empty."""
        self._expect_gradients()
        return super().items()

    def values(self) -> Any:
        """As `items`."""
        self._expect_gradients()
        return super().values()

    def _expect_gradients(self) -> None:
        for each in super().values():
            if isinstance(each, _Empty) and each._handle.context.in_pass():
                each._handle.context.expect_gradient(each)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    @classmethod
    def put(cls, module: nn.Module, moves: bool) -> list[nn.Module]:
        """Gives every module below `module` that has parameters such a table. Returns them."""
        found = [each for each in module.modules() if each._parameters]
        for each in found:
            each.__dict__["_parameters"] = cls(each._parameters, moves)
        return found

    @staticmethod
    def take_off(modules: list[nn.Module]) -> None:
        """Undoes `put`."""
        for each in modules:
            each.__dict__["_parameters"] = dict(each._parameters)


_CLASSES: dict[type, type] = {}
"""By the class that a parameter has while it shows values, the one that it has while it is empty."""
_FULL: dict[type, type] = {}
"""The other way round."""


def _class_of(kind: type) -> type:
    """The class that a parameter of class `kind`, which may be that already, has while it is empty."""
    made = kind if issubclass(kind, _Empty) else _CLASSES.get(kind)
    if made is None:
        made = _CLASSES[kind] = type(kind.__name__, (_Empty, kind), {"full": kind, "__module__": kind.__module__})
        _FULL[made] = kind
    return made


_CLASS = repeat("__class__")


def full_class(param: torch.Tensor) -> type:
    """The class that the parameter has while it shows values."""
    kind = type(param)
    return kind.full if issubclass(kind, _Empty) else kind


def reveal(param: nn.Parameter, data: torch.Tensor) -> None:
    """Lets the parameter show `data`, of its dtype."""
    reveal_all((param,), (data,))


def reveal_all(params: Sequence[nn.Parameter], shown: Sequence[torch.Tensor]) -> None:
    """Lets each parameter show its tensor of `shown`.

    A parameter without values has its asking class at every moment, so another thread that reads it then is refused.
    """
    # Every parameter in every pass: no step of a loop is Python's own.
    with torch._C.DisableTorchFunctionSubclass():
        deque(map(_set_data, params, shown), 0)
        kinds = [*map(type, params)]
        deque(map(setattr, params, _CLASS, map(_FULL.get, kinds, kinds)), 0)


def conceal(param: nn.Parameter, empty: torch.Tensor) -> None:
    """Makes a managed parameter one without values. `empty`: of its dtype, and of size 0."""
    conceal_all((param,), (empty,))


def conceal_all(params: Sequence[nn.Parameter], empties: Sequence[torch.Tensor]) -> None:
    """Makes managed parameters ones without values, as `conceal` does for one."""
    with torch._C.DisableTorchFunctionSubclass():
        kinds = [*map(type, params)]
        empty: list[type | None] = [*map(_CLASSES.get, kinds)]
        if None in empty:
            # A class that is no key is that of an empty parameter, or is met for the first time.
            empty = [*map(_class_of, kinds)]
        deque(map(setattr, params, _CLASS, empty), 0)
        deque(map(_set_data, params, empties), 0)

"""Parameters whose values are elsewhere: what they say of themselves while they are empty.

Such a parameter shows size 0 wherever it is not in use, as with DeepSpeed, and answers under DeepSpeed's names:
`ds_shape`, `ds_numel`, `ds_id`, `ds_status`, `ds_tensor`, `ds_persist`, `ds_active_sub_modules` and `ds_summary()`.
"""

from __future__ import annotations

import itertools
from enum import Enum
from typing import Any, Protocol

import torch
from torch import nn

from zeroxide.errors import ModelError

__all__ = [
    "ManagedParameter",
    "ParamHandle",
    "ZeroParamStatus",
    "handle_of",
    "manage",
    "new_id",
    "shape_of",
    "unmanage",
]

_ids = itertools.count()
_DATA: Any = torch._C.TensorBase.data


def new_id() -> int:
    """The next `ds_id`. Ranks that manage their parameters in one order give them the same."""
    return next(_ids)


class ZeroParamStatus(Enum):
    """DeepSpeed's words for whether a parameter can be used. INFLIGHT exists for its users; nothing is ever in it."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class ParamHandle(Protocol):
    """Who has the values of one parameter."""

    in_engine: bool
    """Whether the values are an engine's; otherwise they wait for one."""
    ident: int
    shape: torch.Size
    holds: int
    """Times that it was opened and not closed."""
    stamp: tuple[int, int]
    """Version and address of what the parameter has shown since it was opened, or since changes last counted."""
    writers: int
    """Those open at present whose changes count."""

    @property
    def persists(self) -> bool:
        """Whether the parameter shows its values at all times."""

    def available(self) -> bool:
        """Whether the parameter shows its values now."""

    def users(self) -> set[nn.Module]:
        """Modules that use the parameter where it is, at present."""

    def local(self) -> torch.Tensor:
        """This rank's part of the values, flat; a copy, or memory that must not be written."""

    def open(self, param: nn.Parameter) -> None:
        """Gives the parameter a copy of all its values, on every rank. Called again, it counts."""

    def give_up(self, param: nn.Parameter) -> None:
        """Undoes an `open` that was interrupted."""

    def hand_out(self, param: nn.Parameter) -> None:
        """The parameter's `.data` was taken, through which values can change and no version counter would say so."""

    def changed_by_hand(self, param: nn.Parameter) -> bool:
        """Whether values have changed since `.data` was taken, which is forgotten."""

    def close(self, param: nn.Parameter, source: int | None) -> None:
        """Ends one `open`; with `source`, what that rank has written becomes the value on every rank.

        Raises ModelError, on all ranks, when the parameter no longer has its shape there.
        """


class ManagedParameter(nn.Parameter):
    """A parameter with a handle."""

    _handle: ParamHandle

    @property
    def data(self) -> torch.Tensor:
        """As of any tensor; its handle hears of it."""
        found: torch.Tensor = _DATA.__get__(self)
        self._handle.hand_out(self)
        return found

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        _DATA.__set__(self, value)

    @property
    def ds_id(self) -> int:
        """A number of its own, the same on every rank."""
        return self._handle.ident

    @property
    def ds_shape(self) -> torch.Size:
        """The shape while it is in use."""
        return self._handle.shape

    @property
    def ds_numel(self) -> int:
        """Elements while it is in use."""
        return self._handle.shape.numel()

    @property
    def ds_status(self) -> ZeroParamStatus:
        """AVAILABLE while it shows its values, else NOT_AVAILABLE."""
        return ZeroParamStatus.AVAILABLE if self._handle.available() else ZeroParamStatus.NOT_AVAILABLE

    @property
    def ds_tensor(self) -> torch.Tensor:
        """This rank's part of the values, flat and without padding. Writing into it changes nothing: see
        `safe_set_local_fp32_param`."""
        return self._handle.local()

    @property
    def ds_persist(self) -> bool:
        """Whether it always shows its values, as at stages 0 to 2."""
        return self._handle.persists

    @property
    def ds_active_sub_modules(self) -> set[nn.Module]:
        """Modules that use it now; a copy, so that emptying it releases nothing."""
        return self._handle.users()

    def ds_summary(self, use_debug_name: bool = False) -> dict[str, Any]:
        """What there is to say of it, under DeepSpeed's keys. Its gradient is never shown: `safe_get_full_grad`."""
        return {
            "id": getattr(self._handle, "name", self.ds_id) if use_debug_name else self.ds_id,
            "status": self.ds_status.name,
            "numel": self.numel(),
            "ds_numel": self.ds_numel,
            "shape": tuple(self.shape),
            "ds_shape": tuple(self.ds_shape),
            "requires_grad": self.requires_grad,
            "grad_shape": None,
            "persist": self.ds_persist,
            "active_sub_modules": self.ds_active_sub_modules,
            "ds_tensor.shape": self.ds_tensor.shape,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            with _copied(self):
                memo[id(self)] = nn.Parameter(self.data.clone(), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A clone: a view would be pickled with all of its unit.
        with _copied(self):
            return torch._utils._rebuild_parameter, (self.data.clone(), self.requires_grad, {})


def _copied(param: ManagedParameter) -> torch.no_grad:
    # Within zero.Init the look at its size gathers it.
    if param.data.numel() != param._handle.shape.numel():
        raise ModelError(
            f"a parameter of shape {tuple(param._handle.shape)} was to be copied or pickled while it is empty: do so "
            "inside zeroxide.zero.GatheredParameters, or take engine.module_state_dict()"
        )
    return torch.no_grad()


def manage(param: nn.Parameter, handle: ParamHandle) -> None:
    """Makes `handle` answer for the parameter. A subclass of Parameter keeps its class, and has no `ds_` names."""
    param._handle = handle  # type: ignore[attr-defined]
    if type(param) is nn.Parameter:
        param.__class__ = ManagedParameter


def unmanage(param: nn.Parameter) -> None:
    """Undoes `manage`: the parameter has its values itself again."""
    del param._handle  # type: ignore[attr-defined]
    if isinstance(param, ManagedParameter):
        param.__class__ = nn.Parameter  # type: ignore[assignment]


def handle_of(param: torch.Tensor) -> ParamHandle | None:
    """Who has the parameter's values; None for one that has them itself."""
    return getattr(param, "_handle", None)


def shape_of(param: torch.Tensor) -> torch.Size:
    """The shape that the parameter has while it is in use."""
    handle = handle_of(param)
    return param.shape if handle is None else handle.shape

"""`zero.GatheredParameters`: parameters with all their values, for reading and for changing."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from zeroxide.device.placement import address
from zeroxide.errors import ConfigError, ModelError
from zeroxide.params.handle import ParamHandle, handle_of
from zeroxide.zero.init.context import cut_all
from zeroxide.zero.init.from_files import FromFiles
from zeroxide.zero.init.slices import Slice
from zeroxide.zero.param import ShardedParam

__all__ = ["GatheredParameters"]


class GatheredParameters:
    """A context in which parameters show all their values, in the dtype of the live weight; DeepSpeed's signature.

    Every rank enters it, before or after `zeroxide.initialize`, inside `zero.Init`, in a forward, and in one another.
    What is shown is a copy: forwards inside the context compute with it.

    params: a parameter, a module, or an iterable of parameters, with None and parameters of others among them, which
        are passed over.
    modifier_rank: whose changes count. At the end of the context they become the values on every rank, exact weights
        included; elements that were not changed keep their exact weight, and optimizer state stays as it is. With
        None all changes are lost, and a change in place, through `param.data` too, or a replaced tensor raises
        ModelError. When the body raises, changes are lost in either case.
    fwd_module: has no effect: forwards of any module use the gathered values.
    enabled: False makes it do nothing.

    Raises ModelError, on all ranks, when a parameter no longer has its shape and dtype on `modifier_rank`.
    """

    def __init__(
        self,
        params: nn.Parameter | nn.Module | Iterable[nn.Parameter | None] | None,
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        self.opened: list[tuple[nn.Parameter, ParamHandle]] = []
        self.filled: FromFiles | None = None
        self.modifier_rank = modifier_rank
        self.listed = _listed(params) if enabled else []

    def __enter__(self) -> GatheredParameters:
        with torch._C.DisableTorchFunction():
            if self.listed:
                cut_all()
            try:
                for param in self.listed:
                    handle = handle_of(param)
                    if handle is not None:
                        _check_rank(handle, self.modifier_rank)
                        self._open(param, handle)
            except BaseException:
                self._close_all(None)
                raise
        slices = [(param, each) for param, each in self.opened if isinstance(each, Slice)]
        if slices and self.modifier_rank == slices[0][1].ranks.rank:
            self.filled = FromFiles(param for param, _ in slices)
            self.filled.__enter__()  # type: ignore[no-untyped-call]
        return self

    def _open(self, param: nn.Parameter, handle: ParamHandle) -> None:
        before = handle.holds
        try:
            handle.open(param)
            if not before:
                handle.stamp = (param._version, address(param))
        except BaseException:
            if handle.holds > before:
                handle.close(param, None)
            else:
                handle.give_up(param)
            raise
        self.opened.append((param, handle))
        handle.writers += self.modifier_rank is not None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.filled is not None:
            self.filled.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self.filled = None
        with torch._C.DisableTorchFunction():
            changed = self._close_all(None if kind is not None else self.modifier_rank)
        if changed and kind is None:
            raise ModelError(
                f"{changed[0]} was changed inside GatheredParameters without modifier_rank, and the change is lost: "
                "say whose changes count, for example modifier_rank=0",
                name=changed[0],
            )

    def _close_all(self, source: int | None) -> list[str]:
        """Ends the use of everything, whatever fails on the way. Returns names of parameters whose changes are lost.

        Every rank meets a ModelError at the same parameter, and the changes of the others count all the same. After
        any other error ranks do different things, and the rest of the changes is given up.
        """
        opened, self.opened = self.opened, []
        lost: list[str] = []
        failed: BaseException | None = None
        for param, handle in reversed(opened):
            handle.writers -= self.modifier_rank is not None
            changed = handle.changed_by_hand(param) or handle.stamp != (param._version, address(param))
            if not handle.writers and self.modifier_rank is None and changed:
                lost.append(getattr(handle, "name", "a parameter"))
            counts = source is not None and (failed is None or isinstance(failed, ModelError))
            try:
                handle.close(param, source if counts else None)
                if counts:
                    handle.stamp = (param._version, address(param))
            except BaseException as found:
                failed = failed or found
        if failed is not None:
            raise failed
        return lost


def _listed(params: Any) -> list[nn.Parameter]:
    if params is None:
        return []
    if isinstance(params, nn.Module):
        params = params.parameters()
    elif isinstance(params, torch.Tensor):
        params = [params]
    # Once each: a second close would write what the first one has.
    return list({id(param): param for param in params if _is_parameter(param)}.values())


def _is_parameter(given: Any) -> bool:
    """Raises ModelError for a matrix that is cut by rows."""
    return isinstance(given, nn.Parameter) or (isinstance(given, torch.Tensor) and handle_of(given) is not None)


def _check_rank(handle: ParamHandle, rank: int | None) -> None:
    world = 1
    if isinstance(handle, ShardedParam) and handle.unit.groups.places and rank is not None:
        raise ModelError(
            f"{handle.name} is an expert's, and ranks have different experts: change it by safe_set_full_fp32_param on "
            "the ranks that have it, not by modifier_rank",
            name=handle.name,
        )
    if isinstance(handle, ShardedParam):
        world = handle.context.ranks.world
    elif isinstance(handle, Slice):
        world = handle.ranks.world
    if rank is not None and not 0 <= rank < world:
        raise ConfigError(
            f"GatheredParameters: modifier_rank: expected 0 to {world - 1}, got {rank}", path="modifier_rank"
        )

"""`zero.GatheredParameters`: parameters with all their values, for reading and for changing."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from zeroxide.errors import ConfigError, ModelError
from zeroxide.zero.init import settle
from zeroxide.zero.keeper import Keeper, keeper_of
from zeroxide.zero.seat import Seat
from zeroxide.zero.slices import Slice

__all__ = ["GatheredParameters"]


class GatheredParameters:
    """A context in which parameters show all their values, in the dtype of the live weight; DeepSpeed's signature.

    Every rank enters it, before or after `zeroxide.initialize`, inside `zero.Init`, in a forward, and in one another.
    What is shown is a copy: forwards inside the context compute with it.

    params: a parameter, a module, or an iterable of parameters, with None and parameters of others among them, which
        are passed over.
    modifier_rank: whose changes count. At the end of the context they become the values on every rank, exact weights
        included; elements that were not changed keep their exact weight, and optimizer state stays as it is. With
        None all changes are lost, and a change in place or a replaced tensor raises ModelError; one made through
        `param.data` is not noticed. When the body raises, changes are lost in either case.
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
        self.opened: list[tuple[nn.Parameter, Keeper, int, int]] = []
        self.modifier_rank = modifier_rank
        self.listed = _listed(params) if enabled else []

    def __enter__(self) -> GatheredParameters:
        with torch._C.DisableTorchFunction():
            if self.listed:
                settle()
            for param in self.listed:
                keeper = keeper_of(param)
                if keeper is None:
                    continue
                _check_rank(keeper, self.modifier_rank)
                keeper.open(param)
                self.opened.append((param, keeper, param._version, param.data_ptr()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        opened, self.opened = self.opened, []
        source = None if kind is not None else self.modifier_rank
        changed: list[str] = []
        failed: ModelError | None = None
        with torch._C.DisableTorchFunction():
            for param, keeper, version, address in reversed(opened):
                if self.modifier_rank is None and (param._version != version or param.data_ptr() != address):
                    changed.append(getattr(keeper, "name", "a parameter"))
                try:
                    keeper.close(param, source)
                except ModelError as found:
                    failed = failed or found
        if failed is not None:
            raise failed
        if changed and kind is None:
            raise ModelError(
                f"{changed[0]} was changed inside GatheredParameters without modifier_rank, and the change is lost: "
                "say whose changes count, for example modifier_rank=0",
                name=changed[0],
            )


def _listed(params: Any) -> list[nn.Parameter]:
    if params is None:
        return []
    if isinstance(params, nn.Module):
        params = params.parameters()
    elif isinstance(params, torch.Tensor):
        params = [params]
    # Once each: a second close would write what the first one has.
    return list({id(param): param for param in params if isinstance(param, nn.Parameter)}.values())


def _check_rank(keeper: Keeper, rank: int | None) -> None:
    world = 1
    if isinstance(keeper, Seat):
        world = keeper.house.ranks.world
    elif isinstance(keeper, Slice):
        world = keeper.ranks.world
    if rank is not None and not 0 <= rank < world:
        raise ConfigError(
            f"GatheredParameters: modifier_rank: expected 0 to {world - 1}, got {rank}", path="modifier_rank"
        )

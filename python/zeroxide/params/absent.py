"""What stands for a parameter in a dict of names: its shape and dtype, and no values.

It is on the meta device, so that whatever rearranges a dict works on it and takes no memory; who asks for values is
told whose they are and how to have them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_leaves

from zeroxide.device.placement import has_values
from zeroxide.errors import ModelError

__all__ = ["AbsentValues"]


class AbsentValues(torch.Tensor):
    """Shape and dtype of a parameter whose values lie in parts on several ranks."""

    name: str = "a weight"

    @classmethod
    def of(cls, name: str, shape: torch.Size, dtype: torch.dtype) -> AbsentValues:
        """Stands for the parameter of that name."""
        found = torch.empty(shape, dtype=dtype, device="meta").as_subclass(cls)
        found.name = name
        return found

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        name = next((each.name for each in leaves if isinstance(each, AbsentValues)), cls.name)
        # torch leaves a tensor that has values as it is where one on the meta device is added to it in place.
        if any(has_values(each) for each in leaves if not isinstance(each, AbsentValues)):
            raise _refusal(name)
        try:
            found = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        except (BufferError, NotImplementedError, RuntimeError, TypeError) as error:
            raise _refusal(name) from error
        for each in tree_leaves(found):
            if isinstance(each, AbsentValues):
                each.name = name
        return found

    def tolist(self) -> NoReturn:
        """Raises ModelError."""
        raise _refusal(self.name)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise _refusal(self.name)


def _refusal(name: str) -> ModelError:
    return ModelError(
        f"{name} was asked for its values through a state dict that has names and shapes alone, since every rank has "
        "but a part of them: call engine._zero3_consolidated_16bit_state_dict() or save_16bit_model on every rank",
        name=name,
    )

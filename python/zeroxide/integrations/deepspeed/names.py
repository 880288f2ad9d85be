"""The names in a module under `deepspeed`: where each lives in zeroxide, or that DeepSpeed has it and zeroxide has not.

A name is imported when it is first used, so that `import deepspeed` costs nothing. One that is not built is a class all
the same: a library may import it and ask `isinstance`, and who calls it is told.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NoReturn

from zeroxide.errors import ModelError
from zeroxide.integrations.deepspeed.surface import PUBLIC, SURFACE, Unbuilt

__all__ = ["fill"]


def fill(module: ModuleType) -> None:
    """Gives an empty module the names that the surface lists for it, and the modules below it."""
    full = module.__name__
    entries = SURFACE[full]
    below = {each.rpartition(".")[2] for each in SURFACE if each.rpartition(".")[0] == full}

    def find(name: str) -> Any:
        if name in below:
            return importlib.import_module(f"{full}.{name}")
        entry = entries.get(name)
        if entry is None:
            raise AttributeError(
                f"{full}.{name}: zeroxide, which answers for DeepSpeed {PUBLIC}, has no such name",
                name=name,
                obj=module,
            )
        found = _placeholder(full, name, entry) if isinstance(entry, Unbuilt) else _imported(entry)
        setattr(module, name, found)
        return found

    module.__dict__.update(
        __getattr__=find,
        __dir__=lambda: sorted({*vars(module), *entries, *below}),
        __all__=sorted(name for name in entries if not name.startswith("_")),
        __doc__=f"zeroxide under the name {full}.",
    )


def _imported(place: str) -> Any:
    home, _, name = place.partition(":")
    module = importlib.import_module(home)
    return getattr(module, name) if name else module


def _placeholder(full: str, name: str, unbuilt: Unbuilt) -> type:
    def refuse(cls: type, *args: Any, **kwargs: Any) -> NoReturn:
        raise ModelError(f"{full}.{name}: {unbuilt.line}", name=f"{full}.{name}")

    return type(name, (), {"__module__": full, "__doc__": unbuilt.line, "__new__": refuse})

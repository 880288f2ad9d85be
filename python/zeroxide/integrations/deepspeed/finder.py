"""How Python's imports and `importlib.metadata` find zeroxide where a program asks for `deepspeed`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from email.message import Message
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from zeroxide.errors import ModelError
from zeroxide.integrations.deepspeed.names import fill
from zeroxide.integrations.deepspeed.surface import NAME, SURFACE, VERSION

__all__ = ["activate", "is_active"]

_LOOKED = ("accelerate", "transformers.integrations.deepspeed", "lightning.fabric.strategies.deepspeed")
"""Modules that look for DeepSpeed while they are imported, and never again."""


class _Metadata(Distribution):
    """What an installed `deepspeed` would say of itself."""

    def read_text(self, filename: str) -> str | None:
        """The one file that there is."""
        if filename not in ("METADATA", "PKG-INFO"):
            return None
        message = Message()
        message["Metadata-Version"] = "2.1"
        message["Name"] = NAME
        message["Version"] = VERSION
        message["Summary"] = "zeroxide under DeepSpeed's name"
        return str(message)

    def locate_file(self, path: Any) -> Any:
        """Where a file of it would be; there is none."""
        return Path(__file__).parent / path


class _Loader(Loader):
    """Makes one module of the surface."""

    def create_module(self, spec: ModuleSpec) -> None:
        """A module as any other."""

    def exec_module(self, module: ModuleType) -> None:
        """Gives it its names, each of which is imported when it is first used."""
        fill(module)


class _Finder(DistributionFinder):
    """Finds the modules of the surface, and the metadata of the whole."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None for what the surface does not have."""
        if fullname not in SURFACE:
            return None
        spec = ModuleSpec(fullname, _Loader(), origin=f"zeroxide for {fullname}", is_package=True)
        # No folder has modules of it: the finder has them all.
        spec.submodule_search_locations = []
        return spec

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        """The metadata, for those who ask for it by name."""
        name = None if context is None else context.name
        return [_Metadata()] if name is not None and name.lower() == NAME else []


def is_active() -> bool:
    """Whether `import deepspeed` finds zeroxide here."""
    return any(isinstance(each, _Finder) for each in sys.meta_path)


def activate() -> None:
    """Makes it so, in this process. Idempotent.

    Raises ModelError where another `deepspeed` has been imported, or a library has looked for one already.
    """
    if is_active():
        return
    if NAME in sys.modules:
        raise ModelError(
            f"{NAME} has been imported from {getattr(sys.modules[NAME], '__file__', 'elsewhere')}: import "
            "zeroxide.integrations.deepspeed before it, or run the script with `zeroxide run`"
        )
    late = [name for name in _LOOKED if name in sys.modules]
    if late:
        raise ModelError(
            f"{late[0]} has been imported, and has looked for {NAME} already: import zeroxide.integrations.deepspeed "
            "before it, or run the script with `zeroxide run`"
        )
    sys.meta_path.insert(0, _Finder())

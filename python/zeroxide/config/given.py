"""What every section's `resolve` is told beside its own keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from zeroxide.config.check import nearest, show, validate
from zeroxide.config.fields import Section
from zeroxide.errors import ConfigError

if TYPE_CHECKING:
    from zeroxide.config.shortcuts import Shortcuts

__all__ = ["Given", "agree"]

S = TypeVar("S", bound=Section)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Given:
    """The keyword arguments, where the document comes from, and the list of keys without effect, which grows."""

    shortcuts: Shortcuts
    origin: str
    """What messages call the source of the document."""
    root: type[Section]
    """The model of the whole document, for suggestions."""
    world_size: int = 1
    stages: int | None = None
    """Ranks that the model is cut for; None for one that is not cut."""
    no_effect: list[tuple[str, str]] = field(default_factory=list)
    sequence: int | None = None
    """Ranks that share the sequences of a batch, as an `mpu` says."""

    def params(self, model: type[S], section: str, data: Mapping[str, Any]) -> S:
        """`data`, the keys in `section`.params, as a `model`. Raises ConfigError as `validate` does."""
        return validate(
            model, data, prefix=(section, "params"), root=self.root, origin=self.origin, no_effect=self.no_effect
        )

    def note_off(self, name: str, section: Section | None) -> None:
        """Lists what else is said in a section `name` whose key `enabled` is false."""
        if section is not None and not getattr(section, "enabled", True):
            said = [key for key in type(section).model_fields if key in section.model_fields_set - {"enabled"}]
            self.no_effect.extend((f"{name}.{key}", f"{name}.enabled is false") for key in said)

    def unknown_type(self, path: str, name: str, built: tuple[str, ...], to_come: tuple[str, ...]) -> ConfigError:
        """The error for a `name` at `path` that is not one of `built`: whether it is to come, or what it is like."""
        ready = " and ".join((", ".join(built[:-1]), built[-1]))
        if name.lower() in (each.lower() for each in to_come):
            line = f"{path}: {show(name)}: not built yet; {ready} are"
        else:
            close = nearest(name, (*built, *to_come))
            hint = f"; the nearest known name is {show(close)}" if close else ""
            line = f"{path}: expected {ready.replace(' and ', ' or ')}, got {show(name)}{hint}"
        return ConfigError(f"{self.origin}: {line}", path=path, expected=ready, got=show(name))


def agree(keyword: str, given: T | None, path: str, configured: T | None) -> T | None:
    """Return whichever of the two is set. Raises `ConfigError` naming both when they are set and differ."""
    if given is None:
        return configured
    if configured is not None and configured != given:
        raise ConfigError(
            f"{keyword}={show(given)} contradicts {path} = {show(configured)} in the config; give only one of them",
            path=path,
            expected=show(configured),
            got=show(given),
        )
    return given

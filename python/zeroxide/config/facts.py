"""The values of a config that all ranks must have alike.

Every field of a section is one, unless `may_differ` marks it with the reason why ranks may differ in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from zeroxide.config.resolved import Config

__all__ = ["Resolved", "config_facts", "may_differ", "reason_to_differ"]

_REASON = "why ranks may differ in it"


class Resolved:
    """The base of what a section comes to: frozen dataclasses whose fields are facts or are marked by `may_differ`."""

    key: ClassVar[str]
    """What stands before the names of its fields in the name of a fact: where a user finds them in the document."""

    def written(self) -> dict[str, Any]:
        """What a document says that comes to this, by dotted key; None where a key is better left out."""
        raise NotImplementedError


def may_differ(reason: str) -> dict[str, str]:
    """The metadata of a field in which ranks may differ for that `reason`."""
    return {_REASON: reason}


def reason_to_differ(field: dataclasses.Field[Any]) -> str | None:
    """Why ranks may differ in `field`; None where they must not."""
    reason: str | None = field.metadata.get(_REASON)
    return reason


def config_facts(config: Config) -> dict[str, str | int | float | None]:
    """One fact for every value in the config that must agree, named "config." and its dotted path."""
    return {f"config.{path}": value for path, value in _flat(config, "")}


def _flat(value: Any, path: str) -> list[tuple[str, str | int | float | None]]:
    """The plain values below `value` with their dotted paths, in the order of the fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        path = value.key if isinstance(value, Resolved) else path
        fields = [each for each in dataclasses.fields(value) if reason_to_differ(each) is None]
        inside = [(each.name, getattr(value, each.name)) for each in fields]
    elif isinstance(value, Mapping):
        inside = sorted(value.items())
    elif value is None or isinstance(value, (str, int, float)):
        return [(path, value)]
    else:
        return [(path, repr(value))]
    dot = f"{path}." if path else ""
    return [fact for name, each in inside for fact in _flat(each, f"{dot}{name}")]

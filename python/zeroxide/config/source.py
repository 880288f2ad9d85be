"""A config as it was given: the parsed document, what to call it, and on which line each key stands."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zeroxide.config import jsonc
from zeroxide.errors import ConfigError

__all__ = ["Source", "read"]

_LARGEST_FILE = 8 << 20  # bytes; real configs are a few KiB


@dataclass(frozen=True)
class Source:
    """A parsed document."""

    data: Mapping[str, Any]
    origin: str = "config"
    """What messages call it: the path of its file."""
    text: str | None = None
    lines: dict[str, int] = field(default_factory=dict)
    """The line of each key, by dotted path, from 1; empty where the document is no file."""

    def line(self, path: str) -> int | None:
        """The line of the key at `path`, or of the innermost section around it that is there; None where none is."""
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        return self.lines.get(path)

    def where(self, path: str) -> str:
        """The place of `path` as editors read it: FILE:LINE."""
        line = self.line(path)
        return self.origin if line is None else f"{self.origin}:{line}"


def read(config: Mapping[str, Any] | str | os.PathLike[str] | None) -> Source:
    """The document that `config` is, or that is in the file of that name. Raises ConfigError."""
    if config is None:
        return Source({})
    if isinstance(config, Mapping):
        return Source(config)
    if not isinstance(config, str | os.PathLike):
        raise ConfigError(f"config: expected a mapping or the path of a JSON file, got {type(config).__name__}")
    path = os.fspath(config)
    try:
        if os.path.getsize(path) > _LARGEST_FILE:
            raise ConfigError(f"{path}: expected a config of at most 8 MiB, got {os.path.getsize(path)} bytes")
        with open(path, encoding="utf-8") as file:
            text = file.read()
        return Source(jsonc.parse(text), path, text, jsonc.lines(text))
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"config file {path!r}: {reason}") from error

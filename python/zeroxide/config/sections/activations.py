"""Where activations wait for backward, and which do not: the keys of `zeroxide` that begin so, and `recompute`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from zeroxide.config.facts import Resolved, may_differ
from zeroxide.errors import ConfigError

if TYPE_CHECKING:
    from zeroxide.config.given import Given
    from zeroxide.config.sections.zero import Zero
    from zeroxide.config.sections.zeroxide import ZeroxideSection

__all__ = ["BUFFERS", "MIN_BUFFERS", "Activations", "resolve"]

BUFFERS = 64 << 20
"""Bytes of memory that activations pass through on their way, where nobody says how many."""
MIN_BUFFERS = 64 << 10
"""Four buffers, each of a few requests to the disk."""

_NO_NUMBER = "each host has its own memory and disks, and it changes no number"


@dataclass(frozen=True)
class Activations(Resolved):
    """Where what autograd saves in forward waits for backward. Sizes are bytes."""

    key: ClassVar[str] = "zeroxide"

    home: Literal["memory", "disk", "auto"] = field(default="memory", metadata=may_differ(_NO_NUMBER))
    """"memory": where they were computed. "auto": there as far as `host_memory` has room, the rest on disk; "memory"
    where no directory is named for that."""
    path: Path | None = field(default=None, metadata=may_differ(_NO_NUMBER))
    """The directory of the file that they are in; set exactly where `home` is not "memory"."""
    disk: int | None = field(default=None, metadata=may_differ(_NO_NUMBER))
    """Size of that file, reserved when the engine is made; `None` is as much as a pass needs, reserved as it grows."""
    buffers: int = field(default=BUFFERS, metadata=may_differ(_NO_NUMBER))
    """Memory that they pass through."""
    recompute: int | Literal["all"] = 0
    """How many of the first blocks of a model compute theirs again in backward, and keep none but their inputs."""

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`."""
        return {
            "zeroxide.activations": self.home,
            "zeroxide.recompute": self.recompute or "none",
            "zeroxide.activation_path": None if self.path is None else str(self.path),
            "zeroxide.activation_disk": self.disk,
            "zeroxide.activation_buffers": None if self.home == "memory" else self.buffers,
        }

    @property
    def memory(self) -> int:
        """Bytes of host memory that they take for as long as the engine lives."""
        return 0 if self.home == "memory" else self.buffers


def resolve(own: ZeroxideSection, on_device: bool | None, state: Zero, given: Given) -> Activations:
    """What zeroxide's `own` keys come to. Raises ConfigError where they need another key, or say what has no effect.

    on_device: `activation_checkpointing.cpu_checkpointing`. state: whose directory serves where none is named.
    """
    keys = {
        "activation_path": own.activation_path,
        "activation_disk": own.activation_disk,
        "activation_buffers": own.activation_buffers,
    }
    again: int | Literal["all"] = 0 if own.recompute == "none" else own.recompute
    if own.activations == "memory" or (own.activations == "auto" and own.activation_path is None):
        for name, value in keys.items():
            if value is not None:
                needs = '"disk" or "auto"' if own.activations == "memory" else '"disk", or zeroxide.activation_path'
                raise _wrong(name, f'needs zeroxide.activations {needs}, got "{own.activations}"')
        return Activations(recompute=again)
    if on_device:
        raise _wrong(
            "activations",
            f'is "{own.activations}" and activation_checkpointing.cpu_checkpointing true: the first is for models '
            "that compute in host memory, the second for a device; give one of them",
        )
    path = own.activation_path or state.offload_optimizer.path or state.offload_param.path
    if path is None:
        raise _wrong("activation_path", f'required when zeroxide.activations is "{own.activations}", a directory')
    if own.activations == "auto" and own.host_memory is None and given.shortcuts.host_memory is None:
        raise _wrong(
            "activation_path",
            'with zeroxide.activations "auto" it needs zeroxide.host_memory, the budget that says what has to leave '
            'memory; give that, or zeroxide.activations "disk", with which all leave it',
        )
    buffers = BUFFERS if own.activation_buffers is None else own.activation_buffers
    if buffers < MIN_BUFFERS:
        raise _wrong("activation_buffers", f"expected at least {MIN_BUFFERS} bytes, got {buffers}")
    if own.activation_disk is not None and own.activation_disk < buffers:
        raise _wrong(
            "activation_disk", f"expected at least activation_buffers = {buffers} bytes, got {own.activation_disk}"
        )
    return Activations(own.activations, path, own.activation_disk, buffers, again)


def _wrong(name: str, problem: str) -> ConfigError:
    return ConfigError(f"zeroxide.{name}: {problem}", path=f"zeroxide.{name}")

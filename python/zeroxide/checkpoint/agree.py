"""What several ranks do together: each does its part, and either all of them go on or all raise the same line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from zeroxide.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    ModelError,
    StorageError,
    ZeroxideError,
)

__all__ = ["RankGroup", "Team"]

T = TypeVar("T")

_KINDS: dict[str, type[ZeroxideError]] = {
    kind.__name__: kind for kind in (BudgetError, CheckpointError, ConfigError, ModelError, StorageError)
}


class RankGroup(Protocol):
    """What is asked of an engine's ranks. `gather_objects` takes JSON values and gives those of all, in rank order."""

    @property
    def rank(self) -> int:
        """Number of this rank, from 0."""

    @property
    def world(self) -> int:
        """How many there are."""

    @property
    def alone(self) -> bool:
        """Whether there is nobody to talk to."""

    def gather_objects(self, obj: Any, /) -> Sequence[Any]:
        """The objects of all ranks, on every rank. Every rank must call it."""


class Team:
    """The ranks of one engine; a single one if `ranks` is None."""

    def __init__(self, ranks: RankGroup | None) -> None:
        self._ranks = None if ranks is None or ranks.alone else ranks
        self.rank = 0 if self._ranks is None else self._ranks.rank
        self.world = 1 if self._ranks is None else self._ranks.world

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which does what only one may do."""
        return self.rank == 0

    def together(self, act: Callable[[], T], path: Path) -> list[T]:
        """Runs `act` on every rank and returns what it returned on each, in rank order. Its results must be JSON.

        Every rank must call it, in the same order. If `act` raises anywhere, every rank raises: a rank that failed
        its own exception where that is no ZeroxideError, all others a ZeroxideError of the same kind that names the
        rank. `path` is what such a CheckpointError or StorageError is about.
        """
        if self._ranks is None:
            return [act()]
        mine: T | None = None
        caught: BaseException | None = None
        try:
            mine = act()
        except BaseException as error:
            caught = error
        found = self._ranks.gather_objects([mine, _described(caught)])
        failed = [(rank, *error) for rank, (_, error) in enumerate(found) if error is not None]
        if caught is not None and not isinstance(caught, ZeroxideError):
            raise caught
        if failed:
            raise self._error(failed, path) from caught
        return [value for value, _ in found]

    def _error(self, failed: list[tuple[int, str, str]], path: Path) -> ZeroxideError:
        # An error of all is nobody's in particular; one that lies with the first rank may be what the others saw.
        rank, name, line = failed[0]
        if len(failed) < self.world or any(other != line for _, _, other in failed):
            line = f"rank {rank}: {line}"
        kind = _KINDS.get(name, CheckpointError)
        if kind is CheckpointError or kind is StorageError:
            return kind(line, path=path)
        return kind(line)

    def same(self, values: Sequence[dict[str, Any]], what: str, path: Path) -> None:
        """Raises CheckpointError unless the ranks gave the same dicts; it names the first key that differs."""
        for rank, value in enumerate(values):
            for key, expected in values[0].items():
                if value[key] != expected:
                    raise CheckpointError(
                        f"the ranks {what}: {key} is {expected!r} on rank 0 and {value[key]!r} on rank {rank}",
                        path=path,
                    )


def _described(error: BaseException | None) -> list[str] | None:
    if error is None:
        return None
    if isinstance(error, ZeroxideError):
        return [type(error).__name__, str(error)]
    text = " ".join(str(error).split())
    return [type(error).__name__, f"{type(error).__name__}: {text}" if text else type(error).__name__]

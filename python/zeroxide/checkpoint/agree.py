"""What several ranks do together: each does its part, and either all of them go on or all raise the same line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from zeroxide import errors
from zeroxide.errors import CheckpointError, StorageError, ZeroxideError

__all__ = ["RankGroup", "Team"]

T = TypeVar("T")

_KINDS: dict[str, type[ZeroxideError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ZeroxideError)
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
        its own exception where that is no ZeroxideError, all others a ZeroxideError that names the first rank that
        failed, of the class and with the fields of what that rank raised; a CheckpointError where that is none.
        `path` is what a CheckpointError or StorageError is about that does not say so itself.
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
        failed = [(rank, error) for rank, (_, error) in enumerate(found) if error is not None]
        if caught is not None and not isinstance(caught, ZeroxideError):
            raise caught
        if failed:
            raise self._error(failed, path) from caught
        return [value for value, _ in found]

    def _error(self, failed: list[tuple[int, dict[str, Any]]], path: Path) -> ZeroxideError:
        # An error of all is nobody's in particular; one that lies with the first rank may be what the others saw.
        rank, first = failed[0]
        line = first["line"]
        if len(failed) < self.world or any(other["line"] != line for _, other in failed):
            line = f"rank {rank}: {line}"
        error = _KINDS.get(first["class"], CheckpointError)(line)
        for name, value in first["fields"].items():
            setattr(error, name, tuple(value) if isinstance(value, list) else value)
        if isinstance(error, CheckpointError | StorageError) and error.path is None:
            error.path = str(path)
        return error

    def same(self, values: Sequence[dict[str, Any]], what: str, path: Path) -> None:
        """Raises CheckpointError unless the ranks gave the same dicts; it names the first key that differs."""
        for rank, value in enumerate(values):
            for key, expected in values[0].items():
                if value[key] != expected:
                    raise CheckpointError(
                        f"the ranks {what}: {key} is {expected!r} on rank 0 and {value[key]!r} on rank {rank}",
                        path=path,
                    )


def _described(error: BaseException | None) -> dict[str, Any] | None:
    if error is None:
        return None
    name = type(error).__name__
    if isinstance(error, ZeroxideError):
        # A value that no message can carry would keep this rank from the exchange, in which the others wait for it.
        fields = {key: value for key, value in vars(error).items() if _is_plain(value)}
        return {"class": name, "line": str(error), "fields": fields}
    text = " ".join(str(error).split())
    return {"class": name, "line": f"{name}: {text}" if text else name, "fields": {}}


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, str | int | float)

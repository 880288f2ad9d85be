"""What a rank is doing, in the form in which the watch sends, compares and prints it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zeroxide.distributed.agreement import name_ranks

__all__ = ["IDLE", "Activity", "Doing", "Failure", "describe", "is_waiting", "summary"]

Doing = tuple[str | None, str | int | None, str | None, int | None]
"""(phase, unit, collective, sequence). With a collective the rank waits for it; without, it computes."""

IDLE: Doing = (None, None, None, None)

_MOST_GROUPS = 4


@dataclass(frozen=True, slots=True)
class Activity:
    """What a rank was doing when it was last heard of, and for how many seconds it had been doing so."""

    doing: Doing = IDLE
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the job cannot go on, in one line, and the ranks that are to blame."""

    line: str
    ranks: tuple[int, ...]


def is_waiting(doing: Doing) -> bool:
    """Whether the rank depends on others to go on."""
    return doing[2] is not None


def describe(doing: Doing) -> str:
    """As a participle: "waiting for all-gather 17 of unit h.3 in forward", "computing backward of unit h.3"."""
    phase, unit, collective, sequence = doing
    of_unit = "" if unit is None else f" of unit {unit}"
    if collective is not None:
        number = "" if sequence is None else f" {sequence}"
        return f"waiting for {collective}{number}{of_unit}{f' in {phase}' if phase else ''}"
    return f"computing {phase}{of_unit}" if phase else "computing outside of any step"


def summary(what: Iterable[tuple[int, str]]) -> str:
    """Ranks by what is said of them: "rank 0 computing forward, ranks 1-3 waiting for barrier 2"; long ones are cut."""
    groups: dict[str, list[int]] = {}
    for rank, text in what:
        groups.setdefault(text, []).append(rank)
    shown = [f"{name_ranks(ranks)} {text}" for text, ranks in groups.items()]
    more = sum(len(ranks) for ranks in list(groups.values())[_MOST_GROUPS:])
    return ", ".join(shown[:_MOST_GROUPS]) + (f", and {more} more ranks elsewhere" if more else "")


def as_doing(values: Sequence[object]) -> Doing:
    """What came over the connection, checked for its shape. Raises ValueError."""
    if len(values) != 4 or not (values[3] is None or isinstance(values[3], int)):
        raise ValueError(f"not an activity: {values!r}")
    phase, unit, collective = (None if each is None else str(each)[:200] for each in values[:3])
    sequence = values[3]
    assert sequence is None or isinstance(sequence, int)
    return phase, unit, collective, sequence

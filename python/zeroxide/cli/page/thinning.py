"""Fewer points for as many columns as a picture has, so that no spike is lost."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["by_column", "thinned"]

Point = tuple[float, float]


def by_column(points: list[Point], low: float, high: float, count: int) -> Iterator[list[Point]]:
    """The points, in ascending order of x, in groups: those of one of `count` columns from `low` to `high` together."""
    group: list[Point] = []
    current = -1
    width = (high - low) / count
    for point in points:
        column = min(count - 1, int((point[0] - low) / width)) if width > 0 else 0
        if column != current and group:
            yield group
            group = []
        current = column
        group.append(point)
    if group:
        yield group


def thinned(points: list[Point], low: float, high: float, count: int) -> list[Point]:
    """Of each column's points the first, the lowest, the highest and the last, in their order."""
    if len(points) <= 2 * count:
        return points
    kept: list[Point] = []
    for group in by_column(points, low, high, count):
        chosen = {0, len(group) - 1}
        chosen.add(min(range(len(group)), key=lambda at: group[at][1]))
        chosen.add(max(range(len(group)), key=lambda at: group[at][1]))
        kept += [group[at] for at in sorted(chosen)]
    return kept

"""A curve over the steps of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from zeroxide.cli.page.markup import Markup, element, join
from zeroxide.cli.page.scale import Scale, number, ticks
from zeroxide.cli.page.thinning import by_column, thinned

__all__ = ["Series", "curve"]

_WIDTH, _HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 28, 12, 40
_COLUMNS = _WIDTH - _LEFT - _RIGHT
_HOVERS = 100
_MEANS = 120
"""Columns of the mean that a line of more points than pixels gets."""


@dataclass(frozen=True)
class Series:
    """(step, value) of some steps; a value that is None leaves a gap and a cross below it."""

    name: str
    points: list[tuple[int, float | None]]
    style: str
    """Class of its colour."""
    dots: bool = False
    """Single values, not a line."""

    @property
    def finite(self) -> list[tuple[float, float]]:
        """The values that there are."""
        return [(float(step), value) for step, value in self.points if value is not None]


def curve(
    name: str, title: str, unit: str, series: list[Series], written: Callable[[float | None], str] = number
) -> Markup:
    """A figure of one or more series with axes, a description and, on hover, values. `name` is its id in the page."""
    shown = [each for each in series if each.points]
    values = [value for each in shown for _, value in each.finite]
    dense = any(len(each.points) > 2 * _COLUMNS for each in shown)
    faint = element("small", " every step faint, their mean on top") if dense else Markup("")
    caption = element("figcaption", element("b", title), f" {unit}" if unit else "", _legend(shown), faint)
    if not values:
        return element("figure", caption, element("p", "There are no values yet.", class_="none"), class_="curve")
    steps = [step for each in shown for step, _ in each.points]
    across = Scale(*_room(float(min(steps)), float(max(steps)), 0.5), _LEFT, _WIDTH - _RIGHT)
    low, high = min(values), max(values)
    margin = 0.06 * (high - low)
    bottom = low - margin if low < 0 or low > margin else 0.0
    up = Scale(*_room(bottom, high + margin, abs(low) * 0.05 or 1.0), _HEIGHT - _BOTTOM, _TOP)
    drawn = [_axes(across, up, written)]
    for each in shown:
        drawn += _crosses(each, across)
        drawn.append(_dots(each, across, up) if each.dots else _line(each, across, up))
    drawn += _hovers(shown, across, written)
    picture = element(
        "svg",
        element("title", f"{title} over steps", id=f"{name}-title"),
        element("desc", _description(shown, unit, written), id=f"{name}-desc"),
        *drawn,
        view_box=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )
    return element("figure", caption, picture, class_="curve", id=name)


def _room(low: float, high: float, beside: float) -> tuple[float, float]:
    """The same range, or one around a single number."""
    return (low, high) if high > low else (low - beside, high + beside)


def _legend(series: list[Series]) -> Markup:
    if len(series) < 2:
        return Markup("")
    keys = [join([element("i", class_=f"key {each.style}"), each.name]) for each in series]
    return element("small", join(keys, " "), class_="legend")


def _axes(across: Scale, up: Scale, written: Callable[[float | None], str]) -> Markup:
    drawn = []
    for value in ticks(up.low, up.high, 5):
        y = up(value)
        drawn.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        drawn.append(element("text", written(value), x=_LEFT - 6, y=y + 4, class_="tick end"))
    whole = [value for value in ticks(across.low, across.high, 5) if value.is_integer()]
    for value in whole or [round((across.low + across.high) / 2)]:
        x = across(value)
        drawn.append(element("line", x1=x, x2=x, y1=_HEIGHT - _BOTTOM, y2=_HEIGHT - _BOTTOM + 4, class_="axis"))
        drawn.append(element("text", number(value), x=x, y=_HEIGHT - _BOTTOM + 17, class_="tick middle"))
    y = _HEIGHT - _BOTTOM
    drawn.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="axis"))
    drawn.append(element("text", "step", x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 6, class_="tick middle"))
    return join(drawn)


def _line(series: Series, across: Scale, up: Scale) -> Markup:
    """The line, broken where a value is missing; a value between two missing ones is a dot.

    Where there are more values than can be told apart, all of them are faint, and their mean by column lies on top.
    """
    pieces: list[list[tuple[float, float]]] = [[]]
    for step, value in series.points:
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append((float(step), value))
    path, single = [], []
    for piece in pieces:
        kept = thinned(piece, across.low, across.high, _COLUMNS)
        if len(kept) == 1:
            single.append(
                element("circle", cx=across(kept[0][0]), cy=up(kept[0][1]), r=2.5, class_=f"dot {series.style}")
            )
        elif kept:
            path.append("M" + "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in kept))
    if not path:
        return join(single)
    dense = len(series.points) > 2 * _COLUMNS
    line = element("path", d="".join(path), class_=f"line {series.style}{' faint' if dense else ''}")
    mean = element("path", d=_mean(series, across, up), class_=f"line {series.style}") if dense else Markup("")
    return join([line, mean, *single])


def _mean(series: Series, across: Scale, up: Scale) -> str:
    groups = by_column(series.finite, across.low, across.high, _MEANS)
    means = ((fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups)
    return "M" + "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in means)


def _dots(series: Series, across: Scale, up: Scale) -> Markup:
    kept = thinned(series.finite, across.low, across.high, _COLUMNS)
    return join(element("circle", cx=across(x), cy=up(y), r=3.5, class_=f"dot {series.style}") for x, y in kept)


def _crosses(series: Series, across: Scale) -> list[Markup]:
    """One for each column with steps that have no finite value."""
    missing = [(float(step), 0.0) for step, value in series.points if value is None]
    drawn = []
    for group in by_column(missing, across.low, across.high, _COLUMNS // 6):
        x, y = across(group[0][0]), _HEIGHT - _BOTTOM - 5
        steps = _steps(group[0][0], group[-1][0])
        hint = element("title", f"{steps}: no finite {series.name}")
        drawn.append(element("path", hint, d=f"M{x - 3:.1f} {y - 3}l6 6m0 -6l-6 6", class_="cross"))
    return drawn


def _hovers(series: list[Series], across: Scale, written: Callable[[float | None], str]) -> list[Markup]:
    """Rectangles that nobody sees, each with the values below it as its title."""
    drawn = []
    named = [(each.name, each.finite) for each in series]
    names = {(step, value): name for name, points in named for step, value in points}
    points = sorted(names)
    width = (across.end - across.start) / _HOVERS
    for group in by_column(points, across.low, across.high, _HOVERS):
        lines = [_steps(group[0][0], group[-1][0])]
        for each in dict.fromkeys(names[point] for point in group):
            values = [point[1] for point in group if names[point] == each]
            low, high = min(values), max(values)
            lines.append(f"{each} {written(low)}" + (f" to {written(high)}" if high > low else ""))
        x = across(group[0][0])
        drawn.append(
            element(
                "rect",
                element("title", "\n".join(lines)),
                x=x - width / 2,
                y=_TOP,
                width=max(width, across(group[-1][0]) - x),
                height=_HEIGHT - _BOTTOM - _TOP,
                class_="hover",
            )
        )
    return drawn


def _steps(first: float, last: float) -> str:
    return f"step {first:.0f}" if first == last else f"steps {first:.0f} to {last:.0f}"


def _description(series: list[Series], unit: str, written: Callable[[float | None], str]) -> str:
    told = []
    for each in series:
        points = each.finite
        if not points:
            told.append(f"{each.name}: no finite value.")
            continue
        values = [value for _, value in points]
        told.append(
            f"{each.name}{f', {unit},' if unit else ''} from {written(points[0][1])} at step {points[0][0]:.0f} to "
            f"{written(points[-1][1])} at step {points[-1][0]:.0f}; lowest {written(min(values))}, highest "
            f"{written(max(values))}."
        )
        missing = len(each.points) - len(points)
        if missing:
            told.append(f"{missing} steps have no finite value.")
    return " ".join(told)

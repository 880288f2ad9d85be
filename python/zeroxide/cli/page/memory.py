"""Where the memory of the process is at the ends of the phases of a step, stacked by bucket, against the budget."""

from __future__ import annotations

from typing import Any

from zeroxide.cli.page.markup import Markup, element, join
from zeroxide.cli.page.scale import Scale, byte_ticks, size
from zeroxide.cli.page.tables import details, table

__all__ = ["memory_figure", "samples_of_one_step"]

_WIDTH, _HEIGHT = 520, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 14, 16, 46
_ROOM = 3.0
"""Where the budget is so many times what is taken, it would leave nothing to see of that."""

OTHER = "everything else"
_STYLES = {
    "weights": "c1",
    "gathered": "c2",
    "gradients": "c3",
    "optimizer": "c4",
    "staging": "c5",
    "activations": "c6",
    "recorder": "c7",
    OTHER: "c0",
}


def samples_of_one_step(memory: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The samples after forward, backward and step of one step, and after the next forward, with what to call them.

    Of several steps the first is taken, and of each of its phases the last sample: with micro-batches that is the
    fullest one.
    """
    if not memory:
        return []
    first = memory[0]["step"]
    names = dict.fromkeys(each["after"] for each in memory if each["step"] == first)
    found = [
        (f"after {name}", next(each for each in reversed(memory) if (each["step"], each["after"]) == (first, name)))
        for name in names
    ]
    later = [each for each in memory if each["step"] > first and each["after"] == "forward"]
    if later:
        found.append(("after next forward", later[0]))
    return found


def memory_figure(memory: list[dict[str, Any]], limit: int | None, peak: int | None) -> Markup:
    """A bar for each sample: the core's buckets as reserved, and on top what else is resident.

    What is resident less the buckets is Python, torch, libraries and activations. Where less is resident than is
    reserved, a part of what is reserved has not been touched or was given back: the mark of what is resident then lies
    within the bar. `limit` and `peak` in bytes.
    """
    bars = samples_of_one_step(memory)
    if not bars:
        return element("p", "No trace was recorded, so the parts at the phases of a step are not known.", class_="none")
    stacks = [(name, _parts(sample), int(sample["resident"])) for name, sample in bars]
    step = bars[0][1]["step"]
    most = max([sum(parts.values()) for _, parts, _ in stacks] + [resident for *_, resident in stacks] + [peak or 0])
    inside = limit is not None and limit <= _ROOM * most
    up = Scale(0.0, 1.04 * max(most, limit if inside and limit else 0, 1), _HEIGHT - _BOTTOM, _TOP)
    names = [name for name in _STYLES if any(parts.get(name) for _, parts, _ in stacks)]
    names += sorted({name for _, parts, _ in stacks for name in parts} - set(_STYLES))
    drawn = [_grid(up), *_bars(stacks, names, up), *_levels(up, limit if inside else None, peak)]
    title = f"Memory over step {step}"
    picture = element(
        "svg",
        element("title", title, id="memory-title"),
        element("desc", _description(stacks, limit, peak), id="memory-desc"),
        *drawn,
        view_box=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_labelledby="memory-title memory-desc",
    )
    keys = [join([element("i", class_=f"key {_style(name)}"), name]) for name in reversed(names)]
    legend = element("small", join(keys, " "), class_="legend")
    caption = element("figcaption", element("b", title), legend)
    above = "" if limit is None or inside else f" The budget, {size(limit)}, lies above the picture."
    note = element(
        "p",
        "Coloured parts are what the core has reserved by bucket; “everything else” is what is resident beside them: "
        "Python, torch, libraries and activations. A mark shows what the system counts as resident; where it "
        "lies within the bar, not all that is reserved has been touched." + above,
        class_="note",
    )
    return join([element("figure", caption, picture, id="memory"), note, _table(stacks, names, limit, peak)])


def _parts(sample: dict[str, Any]) -> dict[str, int]:
    parts = {name: int(count) for name, count in sample["buckets"].items() if count}
    return {**parts, OTHER: max(0, int(sample["resident"]) - sum(parts.values()))}


def _style(name: str) -> str:
    return _STYLES.get(name, "c8")


def _grid(up: Scale) -> Markup:
    drawn = []
    for value in byte_ticks(up.high, 5):
        y = up(value)
        drawn.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        drawn.append(element("text", size(value) if value else "0", x=_LEFT - 6, y=y + 4, class_="tick end"))
    return join(drawn)


def _bars(stacks: list[tuple[str, dict[str, int], int]], names: list[str], up: Scale) -> list[Markup]:
    drawn = []
    each = (_WIDTH - _LEFT - _RIGHT) / len(stacks)
    width = min(80.0, 0.6 * each)
    for place, (label, parts, resident) in enumerate(stacks):
        x = _LEFT + (place + 0.5) * each - width / 2
        base = 0
        # The other parts at the bottom: they are there before the engine is.
        for name in sorted(names, key=lambda name: name != OTHER):
            count = parts.get(name, 0)
            if not count:
                continue
            top, bottom = up(base + count), up(base)
            hint = element("title", f"{label}: {name} {size(count)}")
            drawn.append(
                element("rect", hint, x=x, y=top, width=width, height=bottom - top, class_=f"part {_style(name)}")
            )
            base += count
        y = up(resident)
        hint = element("title", f"{label}: {size(resident)} resident")
        drawn.append(element("line", hint, x1=x - 6, x2=x + width + 6, y1=y, y2=y, class_="resident"))
        lines = label.removeprefix("after ").split(" ")
        for row, word in enumerate(["after", " ".join(lines)]):
            y = _HEIGHT - _BOTTOM + 17 + 14 * row
            drawn.append(element("text", word, x=x + width / 2, y=y, class_="tick middle"))
    y = float(_HEIGHT - _BOTTOM)
    drawn.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="axis"))
    return drawn


def _levels(up: Scale, limit: int | None, peak: int | None) -> list[Markup]:
    drawn, last = [], None
    for name, value, style in (("budget", limit, "budget"), ("peak of the run", peak, "peak")):
        if value is None:
            continue
        y = up(value)
        drawn.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_=style))
        # Two lines close together have their words on either side.
        above = last is None or y - last > 16
        at = y - 4 if above else y + 13
        last = y
        drawn.append(element("text", f"{name} {size(value)}", x=_WIDTH - _RIGHT - 4, y=at, class_="tick end halo"))
    return drawn


def _description(stacks: list[tuple[str, dict[str, int], int]], limit: int | None, peak: int | None) -> str:
    told = [
        f"{label}: {', '.join(f'{name} {size(count)}' for name, count in parts.items())}; {size(resident)} resident."
        for label, parts, resident in stacks
    ]
    told.append(f"Budget: {size(limit)}." if limit is not None else "There is no budget.")
    if peak is not None:
        told.append(f"Peak of the run: {size(peak)}.")
    return " ".join(told)


def _table(
    stacks: list[tuple[str, dict[str, int], int]], names: list[str], limit: int | None, peak: int | None
) -> Markup:
    head = ["", *(label for label, *_ in stacks)]
    rows = [[name, *(size(parts.get(name, 0)) for _, parts, _ in stacks)] for name in names]
    rows.append(["resident", *(size(resident) for *_, resident in stacks)])
    untouched = [max(0, sum(parts.values()) - resident) for _, parts, resident in stacks]
    rows.append(["reserved, not resident", *(size(count) for count in untouched)])
    rows.append(["budget", *(size(limit) if limit is not None else "none" for _ in stacks)])
    rows.append(["peak of the run", *(size(peak) for _ in stacks)])
    return details("Values of this picture", table("Memory at the ends of phases", head, rows))

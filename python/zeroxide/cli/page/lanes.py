"""Some steps over time: calls of the engine above, and below what the disk, the CPU and the waits did meanwhile."""

from __future__ import annotations

from zeroxide.cli.page.markup import Markup, element, join
from zeroxide.cli.page.scale import NOTHING, Scale, number, seconds, size, ticks
from zeroxide.cli.page.tables import details, table
from zeroxide.cli.page.timeline import Interval, Phase, Timeline, overlap, total, union

__all__ = ["timeline_figure"]

_WIDTH = 960
_LEFT, _RIGHT, _TOP = 132, 12, 22
_LANE, _BAR = 34, 24

_LANES = (
    ("gather", "weights gathered", "c2", False),
    ("accumulate", "gradients taken", "c3", False),
    ("reduce", "sums over ranks", "c6", False),
    ("update", "tiles updated", "c4", False),
    ("read", "disk reads", "c1", True),
    ("write", "disk writes", "c5", True),
    ("disk wait", "waits for the disk", "bad", False),
    ("rank wait", "waits for ranks", "bad", False),
)
"""Activity, its name, its colour, and whether several at a time are drawn as a height."""

_PHASES = {"forward": "p1", "backward": "p2", "step": "p3", "finish": "p4"}


def timeline_figure(timeline: Timeline | None) -> Markup:
    """The picture, what it shows in words, and its numbers."""
    if timeline is None or not timeline.phases:
        return element("p", "No trace was recorded.", class_="none")
    lanes = [lane for lane in _LANES if timeline.activities.get(lane[0])]
    height = _TOP + _LANE * (1 + len(lanes)) + 34
    across = Scale(0.0, max(timeline.end, 1e-9), _LEFT, _WIDTH - _RIGHT)
    drawn = [_axis(across, height), _phases(timeline.phases, across)]
    for place, (activity, name, style, high) in enumerate(lanes, 1):
        top = _TOP + _LANE * place
        intervals = timeline.activities[activity]
        drawn.append(element("text", name, x=_LEFT - 8, y=top + 16, class_="tick end"))
        path = _heights(intervals, across, top) if high else _bars(intervals, across, top)
        hint = element("title", f"{name}: {_told(timeline, activity)}")
        drawn.append(element("path", hint, d=path, class_=f"lane {style}"))
    title = _title(timeline)
    picture = element(
        "svg",
        element("title", title, id="timeline-title"),
        element("desc", _description(timeline, lanes), id="timeline-desc"),
        *drawn,
        view_box=f"0 0 {_WIDTH} {height}",
        role="img",
        aria_labelledby="timeline-title timeline-desc",
    )
    caption = element(
        "figcaption",
        element("b", title),
        " of what happened when; the disk's rows are as high as it had requests at once",
    )
    scroll = element("div", picture, class_="scroll wide", tabindex=0, role="region", aria_label=title)
    return join([element("figure", caption, scroll, id="timeline"), _note(timeline), _table(timeline, lanes)])


def _title(timeline: Timeline) -> str:
    steps = timeline.steps
    if not steps:
        return "Timeline"
    return f"Timeline of step {steps[0]}" if len(steps) == 1 else f"Timeline of steps {steps[0]} to {steps[-1]}"


def _axis(across: Scale, height: int) -> Markup:
    drawn = []
    bottom = height - 34.0
    unit, factor = ("ms", 1e3) if across.high < 1 else ("s", 1.0)
    for value in ticks(0.0, across.high * factor, 8):
        x = across(value / factor)
        drawn.append(element("line", x1=x, x2=x, y1=_TOP, y2=bottom, class_="grid"))
        drawn.append(element("text", number(value), x=x, y=bottom + 16, class_="tick middle"))
    drawn.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=bottom, y2=bottom, class_="axis"))
    drawn.append(element("text", unit, x=_WIDTH - _RIGHT, y=bottom + 30, class_="tick end"))
    return join(drawn)


def _phases(phases: list[Phase], across: Scale) -> Markup:
    drawn = [element("text", "engine", x=_LEFT - 8, y=_TOP + 16, class_="tick end")]
    seen = 0
    for phase in phases:
        x, width = across(phase.begin), across(phase.end) - across(phase.begin)
        hint = element("title", f"{phase.name} of step {phase.step}: {seconds(phase.end - phase.begin)}")
        style = f"phase {_PHASES.get(phase.name, 'p4')}"
        drawn.append(element("rect", hint, x=x, y=_TOP, width=max(width, 0.8), height=_BAR, class_=style))
        if width > 7.2 * len(phase.name) + 6:
            drawn.append(element("text", phase.name, x=x + width / 2, y=_TOP + 16, class_="inside middle"))
        if phase.step > seen and phase.name != "finish":
            seen = phase.step
            drawn.append(element("line", x1=x, x2=x, y1=6, y2=_TOP, class_="axis"))
            drawn.append(element("text", f"step {phase.step}", x=x + 4, y=15, class_="tick"))
    return join(drawn)


def _bars(intervals: list[Interval], across: Scale, top: int) -> str:
    """Bars where at least one is under way, each at least half a pixel wide: what would touch in the picture is one."""
    bars: list[tuple[float, float]] = []
    for begin, end in union(intervals):
        left = across(begin)
        right = max(across(end), left + 0.5)
        if bars and left - bars[-1][1] < 0.3:
            bars[-1] = (bars[-1][0], max(bars[-1][1], right))
        else:
            bars.append((left, right))
    return "".join(f"M{left:.1f} {top}h{right - left:.1f}v{_BAR}h-{right - left:.1f}z" for left, right in bars)


def _heights(intervals: list[Interval], across: Scale, top: int) -> str:
    """For each pixel the most that were under way at once, the most of all as high as the lane."""
    count = _WIDTH - _LEFT - _RIGHT
    changes = sorted([(begin, 1) for begin, _ in intervals] + [(end, -1) for _, end in intervals])
    most = [0] * (count + 1)
    active, at = 0, 0
    for moment, change in changes:
        pixel = min(count, int(across(moment) - _LEFT))
        # Those that are under way on all pixels since the last change.
        for between in range(at, pixel + 1):
            most[between] = max(most[between], active)
        active += change
        most[pixel] = max(most[pixel], active)
        at = pixel
    highest = max(most)
    path, level = [f"M{_LEFT} {top + _BAR}"], 0
    for pixel, value in enumerate(most):
        if value != level:
            path.append(f"H{_LEFT + pixel}V{top + _BAR - _BAR * value / highest:.1f}")
            level = value
    return "".join(path) + f"H{_LEFT + count + 1}V{top + _BAR}z"


def _told(timeline: Timeline, activity: str) -> str:
    intervals = timeline.activities[activity]
    busy = total(intervals)
    moved = timeline.moved.get(activity, 0)
    words = f"{number(len(intervals))} in {seconds(busy)}, {busy / timeline.end:.0%} of the time"
    return words + (f", {size(moved)}" if moved else "")


def _description(timeline: Timeline, lanes: list[tuple[str, str, str, bool]]) -> str:
    told = [f"{phase.name} of step {phase.step} {seconds(phase.end - phase.begin)}" for phase in timeline.phases[:12]]
    more = len(timeline.phases) - len(told)
    words = f"Calls of the engine: {', '.join(told)}{f' and {more} more' if more > 0 else ''}. "
    return words + "".join(f"{name}: {_told(timeline, activity)}. " for activity, name, *_ in lanes)


def _note(timeline: Timeline) -> Markup:
    """What the disk did while something was computed, and what the trace lacks."""
    activities = timeline.activities
    disk = activities.get("read", []) + activities.get("write", [])
    words = []
    if disk:
        busy, waits = total(disk), activities.get("disk wait", [])
        hidden = 1.0 - overlap(disk, waits) / busy if busy else 1.0
        words.append(
            f"The disk was busy for {seconds(busy)} of {seconds(timeline.end)}; for {hidden:.0%} of that nobody waited "
            "for it."
        )
        updates = activities.get("update", [])
        if updates:
            words.append(
                f"While tiles were updated ({seconds(total(updates))}), the disk was reading for "
                f"{seconds(overlap(updates, activities.get('read', [])))} and writing for "
                f"{seconds(overlap(updates, activities.get('write', [])))}."
            )
    else:
        words.append("Nothing came from the disk or went to it.")
    if timeline.left_out:
        words.append(f"{number(timeline.left_out)} earlier events are not here: the recorder keeps the newest.")
    words.append("trace.json has every event; ui.perfetto.dev and chrome://tracing open it.")
    return element("p", " ".join(words), class_="note")


def _table(timeline: Timeline, lanes: list[tuple[str, str, str, bool]]) -> Markup:
    phases = [
        [f"{phase.name}, step {phase.step}", seconds(phase.begin), seconds(phase.end - phase.begin)]
        for phase in timeline.phases
    ]
    rows = []
    for activity, name, *_ in lanes:
        intervals, moved = timeline.activities[activity], timeline.moved.get(activity, 0)
        busy = total(intervals)
        rate = f"{moved / busy / 1e9:.3g} GB/s" if moved and busy else NOTHING
        share = f"{busy / timeline.end:.1%}"
        rows.append([name, number(len(intervals)), seconds(busy), share, size(moved) if moved else NOTHING, rate])
    head = ["activity", "events", "under way", "share", "bytes", "rate"]
    return details(
        "Values of this picture",
        table("Calls of the engine", ["call", "begins at", "takes"], phases),
        table("What the core did", head, rows),
    )

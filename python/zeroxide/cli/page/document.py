"""The page as a whole: one file, which asks nothing of a network and runs no script."""

from __future__ import annotations

from pathlib import Path

from zeroxide.cli.page.curves import Series, curve
from zeroxide.cli.page.facts import achieved, headline, run_facts, status
from zeroxide.cli.page.lanes import timeline_figure
from zeroxide.cli.page.log import RunLog, finite, read_log
from zeroxide.cli.page.markup import Markup, element, join
from zeroxide.cli.page.memory import memory_figure
from zeroxide.cli.page.scale import NOTHING, number
from zeroxide.cli.page.style import STYLE
from zeroxide.cli.page.tables import details, table
from zeroxide.cli.page.timeline import read_timeline

__all__ = ["page"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_ROWS = 20_000
"""Steps in the table at most: a browser takes seconds for more."""

_COLUMNS = (
    ("loss", "loss"),
    ("grad_norm", "gradient norm"),
    ("lr", "learning rate"),
    ("tokens_per_second", "tokens/s"),
    ("seconds", "seconds"),
    ("forward_seconds", "forward s"),
    ("backward_seconds", "backward s"),
    ("step_seconds", "step s"),
    ("rss", "resident bytes"),
    ("peak_rss", "peak bytes"),
    ("read_bytes", "bytes read"),
    ("write_bytes", "bytes written"),
    ("io_wait_seconds", "disk waits s"),
)


def page(log_path: Path, trace_path: Path) -> str:
    """The page about the run whose log and trace these are. A trace that the log does not tell of is not the run's."""
    log = read_log(log_path)
    timeline = read_timeline(trace_path) if "trace" in log.last else None
    name = str(log.start.get("model") or log_path.parent.name)
    title = f"zeroxide train: {name}"
    body = element(
        "main",
        element("h1", title),
        element("p", status(log), class_="status"),
        headline(log),
        element("h2", "Training"),
        _curves(log),
        element("h2", "Memory"),
        memory_figure(timeline.memory if timeline else [], log.limit, log.peak),
        element("h2", "What was planned"),
        achieved(log),
        element("h2", "Timeline"),
        timeline_figure(timeline),
        element("h2", "The run"),
        run_facts(log),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    return "<!DOCTYPE html>\n" + element("html", head, element("body", body), lang="en") + "\n"


def _curves(log: RunLog) -> Markup:
    held_out: list[tuple[int, float | None]] = [
        (step, finite(event.get("loss"))) for step, event in log.held_out.items()
    ]
    loss = [Series("training", log.column("loss"), "c1"), Series("held out", held_out, "c3", dots=True)]
    drawn = [
        curve("loss", "Loss", "nats per token", loss),
        curve("rate", "Learning rate", "", [Series("learning rate", log.column("lr"), "c4")]),
        curve("norm", "Gradient norm", "before clipping", [Series("gradient norm", log.column("grad_norm"), "c2")]),
        curve("speed", "Speed", "tokens per second", [Series("tokens/s", log.column("tokens_per_second"), "c1")]),
    ]
    skipped = [step for step, event in log.steps.items() if event.get("applied") is False]
    told = []
    if skipped:
        shown = ", ".join(map(str, skipped[:20])) + (f" and {len(skipped) - 20} more" if len(skipped) > 20 else "")
        words = f"Left out, since a gradient was not finite: {'step' if len(skipped) == 1 else 'steps'} {shown}."
        told.append(element("p", words, class_="note"))
    return join([element("div", *drawn, class_="curves"), *told, _values(log)])


def _values(log: RunLog) -> Markup:
    """Every number behind the curves."""
    if not log.steps and not log.held_out:
        return Markup("")
    every = -(-len(log.steps) // _ROWS) or 1
    columns = [(key, name) for key, name in _COLUMNS if any(key in event for event in log.steps.values())]
    rows = []
    for place, (step, event) in enumerate(log.steps.items()):
        if place % every and step != max(log.steps):
            continue
        rows.append([str(step), *(_exact(event.get(key)) for key, _ in columns)])
    caption = "Steps" if every == 1 else f"Every {every}th step; log.jsonl has all"
    inside = [table(caption, ["step", *(name for _, name in columns)], rows)]
    if log.held_out:
        evals = [
            [str(step), _exact(event.get("loss")), number(finite(event.get("perplexity")))]
            for step, event in log.held_out.items()
        ]
        inside.append(table("Losses on held-out text", ["after step", "loss", "perplexity"], evals))
    return details("Values of these curves", *inside)


def _exact(value: object) -> str:
    """A number of the log with six digits that count, sizes and counts in full."""
    known = finite(value)
    if known is None:
        return NOTHING
    return str(int(known)) if known.is_integer() and abs(known) < 1e15 else f"{known:.6g}"

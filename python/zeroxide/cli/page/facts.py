"""What a run was, what the plan expected of it, and what it came to, in words and tables."""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Mapping
from typing import Any

from zeroxide.cli.page.log import RunLog
from zeroxide.cli.page.markup import Markup, element, join
from zeroxide.cli.page.scale import NOTHING, number, size
from zeroxide.cli.page.tables import details, pairs, table

__all__ = ["achieved", "headline", "run_facts", "status"]


def status(log: RunLog) -> str:
    """How the run ended, or where its log does."""
    last = max(log.steps, default=log.start.get("step", 0))
    event = log.last.get(log.ending or "", {})
    step = event.get("step", last)
    if log.ending == "end":
        return f"The run finished after step {step}."
    if log.ending == "stopped":
        return f"The run was stopped by {event.get('signal', 'a signal')} after step {step}."
    if log.ending == "error":
        return f"The run failed after step {step}: {event.get('message', '')}"
    if log.ending == "interrupted":
        return f"The run was interrupted after step {step}, before it could save."
    return f"The log ends after step {last}: the run is going on, or was killed."


def headline(log: RunLog) -> Markup:
    """A few numbers that most look for."""
    losses = [value for _, value in log.column("loss") if value is not None]
    held_out = [event.get("loss") for event in log.held_out.values()]
    rates = [value for _, value in log.column("tokens_per_second") if value is not None]
    shown = [
        ("loss of the last step", number(losses[-1]) if losses else NOTHING),
        ("held-out loss", number(held_out[-1]) if held_out else NOTHING),
        ("tokens per second, median", number(statistics.median(rates)) if rates else NOTHING),
        ("peak resident memory", size(log.peak) + (f" of {size(log.limit)}" if log.limit else ", no budget")),
    ]
    return element("div", *(element("p", element("b", text), name) for name, text in shown), class_="headline")


def achieved(log: RunLog) -> Markup:
    """What was expected of memory and disk beside what was reached."""
    expected, reached = log.expected, dict(log.reached)
    if log.peak is not None:
        reached["process"] = log.peak
    rows = []
    for name in dict.fromkeys([*expected, *reached]):
        want, got = expected.get(name), reached.get(name)
        if not (want or got):
            continue
        label = "whole process" if name == "process" else name
        rows.append([label, size(want), size(got), _ratio(got, want)])
    traffic = log.last.get("traffic")
    if traffic:
        for name, want, got in zip(("read", "written"), traffic["expected"], traffic["took"], strict=True):
            rows.append([f"disk, {name} in a step", size(want), size(got), _ratio(got, want)])
    if not rows:
        return element("p", "The run has not come to a point that could be compared.", class_="none")
    note = (
        "Memory is the peak of each bucket; of disk traffic, the median of the steps after the second."
        if traffic
        else "Memory is the peak of each bucket. The disk's traffic was not compared: there was none, or too few steps."
    )
    if traffic and (len(log.held_out) > 1 or len(log.checkpoints) > 1):
        note += " Evaluation and checkpoints between steps end an update outside of its step, which is not counted."
    compared = table("Expected and reached", ["", "expected", "reached", "ratio"], rows)
    return join([compared, element("p", note, class_="note")])


def _ratio(got: float | None, want: float | None) -> str:
    return f"{got / want:.3f}" if got is not None and want else NOTHING


def run_facts(log: RunLog) -> Markup:
    """Model, budget, options, config, versions, machine and command."""
    start, facts = log.start, log.facts
    options, machine, tokens = start.get("options", {}), facts.get("machine", {}), facts.get("tokens", {})
    count = start.get("parameters")
    rows = [
        ("model", f"{start.get('model', '')}, {number(count)} parameters" if count else ""),
        ("compute", f"{options.get('dtype', '')} on {facts.get('device', 'cpu')}" if options else ""),
        ("state", f"--offload {options.get('offload', '')}" if options else ""),
        ("budget", size(log.limit) if log.limit else "none"),
        ("data", f"{facts.get('data', '')}: {number(tokens['train'])} tokens" if tokens else ""),
        ("ranks", str(facts.get("ranks", ""))),
        ("disk queue", str(facts.get("disk", ""))),
        ("checkpoints", ", ".join(f"step {step}" for step in dict.fromkeys(log.checkpoints[-6:]))),
        ("started", _started(log)),
        ("command", element("code", str(facts.get("command", ""))) if facts.get("command") else ""),
        ("machine", _machine(machine)),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())),
    ]
    shown = [pairs(rows)]
    if start.get("plan"):
        shown.append(details("Plan", element("pre", "\n".join(start["plan"]))))
    if options:
        shown.append(details("Options", _mapping("Options of the run", options)))
    if facts.get("config"):
        shown.append(details("Config", element("pre", json.dumps(facts["config"], indent=1, ensure_ascii=False))))
    sample = log.last.get("sample")
    if sample:
        shown.append(details("Sample", element("pre", element("b", sample["prompt"]), sample["text"])))
    return join(shown)


def _started(log: RunLog) -> str:
    times = [each["time"] for each in log.starts if isinstance(each.get("time"), (int, float))]
    if not times:
        return ""
    first = datetime.datetime.fromtimestamp(times[0], datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    resumes = len(times) - 1
    return first + (f", resumed {resumes} time{'s' if resumes > 1 else ''}" if resumes else "")


def _machine(machine: Mapping[str, Any]) -> str:
    if not machine:
        return ""
    words = [machine.get("processor") or "", f"{machine.get('processors', '?')} processors"]
    words += [f"{size(machine.get('memory'))} of memory", machine.get("system", "")]
    return ", ".join(word for word in words if word)


def _mapping(caption: str, values: Mapping[str, Any]) -> Markup:
    rows = [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in values.items()]
    return table(caption, ["option", "value"], rows)

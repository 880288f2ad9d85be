"""The page about a run: that every number of the log is on it, whatever the run was like, and that it stands alone."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from page_reading import read, rows

import zeroxide.cli
from zeroxide.cli.page.curves import Series, curve
from zeroxide.cli.page.document import page
from zeroxide.cli.page.markup import Markup, element
from zeroxide.cli.page.memory import OTHER, memory_figure, samples_of_one_step
from zeroxide.cli.page.scale import Scale, byte_ticks, number, seconds, ticks
from zeroxide.cli.page.thinning import by_column, thinned
from zeroxide.cli.page.timeline import overlap, read_timeline, total, union

MIB = 1 << 20


def step(number, **changes):
    values = {
        "event": "step", "time": 1.0, "step": number, "loss": 5.0 - 0.125 * number, "grad_norm": 0.5 + number,
        "lr": 1e-4 * number, "tokens": 64, "tokens_per_second": 100.25 + number, "seconds": 2.0,
        "forward_seconds": 0.5, "backward_seconds": 1.0, "step_seconds": 0.5, "rss": 900 * MIB,
        "peak_rss": 1000 * MIB, "limit": 2048 * MIB, "read_bytes": 4 * MIB, "write_bytes": 3 * MIB,
        "io_wait_seconds": 0.25, "applied": True,
    }  # fmt: skip
    return {**values, **changes}


def start(**changes):
    facts = {
        "command": "zeroxide train --model gpt2", "ranks": 1, "limit": 2048 * MIB, "device": "cpu", "disk": "io_uring",
        "data": "text", "tokens": {"train": 1000, "held_out": 10}, "expected": {"gradients": 8 * MIB, "total": 8 * MIB},
        "config": {"bf16": {"enabled": True}}, "versions": {"torch": "2.9"},
        "machine": {"system": "Linux", "processor": "A & B", "processors": 2, "memory": 1 << 34},
    }  # fmt: skip
    options = {"dtype": "bf16", "offload": "cpu", "data": []}
    values = {
        "event": "start", "time": 1e9, "step": 0, "model": "gpt2", "parameters": 1234, "options": options,
        "plan": ["1 unit"], "facts": {**facts, **changes.pop("facts", {})},
    }  # fmt: skip
    return {**values, **changes}


def written(folder, events, trace=None):
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if trace is not None:
        (folder / "trace.json").write_text(json.dumps(trace))
    return page(folder / "log.jsonl", folder / "trace.json")


def traced(steps=(4, 5), resident=700 * MIB, disk=True):
    events, memory, at = [], [], 0.0
    for number_ in steps:
        for name, takes in (("forward", 300.0), ("backward", 500.0), ("step", 50.0)):
            phase = {"ph": "X", "cat": "engine", "name": name, "pid": 0, "tid": 0, "ts": at, "dur": takes}
            events.append({**phase, "args": {"step": number_}})
            at += takes
            buckets = {"weights": 0, "gradients": 200 * MIB, "staging": 32 * MIB}
            sample = {"after": name, "step": number_, "ns": 0, "ts": at, "buckets": buckets, "resident": resident}
            memory.append(sample)
    core = {"ph": "X", "pid": 0, "tid": 0, "args": {"unit": "h.0", "bytes": MIB}}
    events.append({**core, "cat": "core", "name": "update", "ts": 900.0, "dur": 100.0})
    if disk:
        events.append({**core, "cat": "disk", "name": "read", "ts": 850.0, "dur": 100.0})
        events.append({**core, "cat": "disk", "name": "read", "ts": 880.0, "dur": 40.0})
        events.append({**core, "cat": "disk", "name": "write", "ts": 950.0, "dur": 200.0})
        events.append({**core, "cat": "core", "name": "disk wait", "ts": 850.0, "dur": 50.0, "args": {}})
    events.append({"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "rank 0"}})
    return {"traceEvents": events, "otherData": {"memory": memory, "left_out": 0}}


END = {"event": "end", "step": 5, "loss": 4.5, "peak_rss": 1000 * MIB, "limit": 2048 * MIB,
       "expected": {"gradients": 8 * MIB, "total": 8 * MIB, "process": 990 * MIB},
       "reached": {"gradients": 8 * MIB, "total": 10 * MIB, "process": 1000 * MIB}}  # fmt: skip
TRACE = {"event": "trace", "step": 5, "first": 4, "last": 5}
WHOLE = [
    start(),
    *(step(each) for each in range(1, 6)),
    {"event": "eval", "step": 3, "loss": 4.75, "perplexity": math.exp(4.75)},
    TRACE,
    {"event": "traffic", "step": 5, "expected": [5 * MIB, 3 * MIB], "took": [4 * MIB, 3 * MIB]},
    {"event": "sample", "step": 5, "prompt": "def <f>", "text": "(a & b)"},
    END,
]


def test_every_number_of_the_log_is_there(tmp_path):
    found = read(written(tmp_path, WHOLE, traced()))
    head, *body = rows(found, "Steps")
    assert head[:5] == ["step", "loss", "gradient norm", "learning rate", "tokens/s"]
    assert [row[0] for row in body] == ["1", "2", "3", "4", "5"]
    for number_, row in enumerate(body, 1):
        event = step(number_)
        keys = ("loss", "grad_norm", "lr", "tokens_per_second", "seconds", "forward_seconds", "backward_seconds")
        keys += ("step_seconds", "rss", "peak_rss", "read_bytes", "write_bytes", "io_wait_seconds")
        assert [float(cell) for cell in row[1:]] == [pytest.approx(event[key], rel=1e-5) for key in keys]
    assert rows(found, "Losses on held-out text")[1] == ["3", "4.75", number(math.exp(4.75))]
    compared = {row[0]: row[1:] for row in rows(found, "Expected and reached")}
    assert compared["gradients"] == ["8 MiB", "8 MiB", "1.000"]
    assert compared["total"] == ["8 MiB", "10 MiB", "1.250"]
    assert compared["whole process"] == ["990 MiB", "1000 MiB", "1.010"]
    assert compared["disk, read in a step"] == ["5 MiB", "4 MiB", "0.800"]
    assert compared["disk, written in a step"] == ["3 MiB", "3 MiB", "1.000"]
    for words in (
        "The run finished after step 5.",
        "A & B",
        "zeroxide train --model gpt2",
        "torch 2.9",
        "def <f>(a &",
    ):
        assert words in found.text
    assert {figure.attributes.get("id") for figure in found.all("figure")} == {
        "loss", "rate", "norm", "speed", "memory", "timeline",
    }  # fmt: skip


def test_what_a_run_says_cannot_become_markup(tmp_path):
    words = "<script>alert(1)</script>\"'&"
    events = [
        start(model=words, facts={"data": words, "command": words, "machine": {"processor": words}}),
        {"event": "error", "step": 0, "message": words},
    ]
    found = read(written(tmp_path, events))
    assert found.all("h1")[0].text == f"zeroxide train: {words}"
    assert f"The run failed after step 0: {words}" in found.text


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([], "The log ends after step 0"),
        ([start()], "The log ends after step 0"),
        ([start(), step(1)], "The log ends after step 1"),
        ([start(), step(1), {"event": "stopped", "step": 1, "signal": "SIGINT"}], "stopped by SIGINT after step 1."),
        ([start(), step(1), {"event": "interrupted", "step": 1}], "interrupted after step 1"),
        ([start(), step(1), {"event": "error", "step": 1, "message": "the loss is nan"}], "step 1: the loss is nan"),
        ([start(), step(1), END, start(step=1), step(2)], "The log ends after step 2"),
    ],
)
def test_runs_of_every_length_and_end_have_a_page(tmp_path, events, words):
    found = read(written(tmp_path, events))
    assert words in found.text
    assert len(found.all("figure")) >= 4
    assert "No trace was recorded" in found.text


def test_values_that_are_no_numbers_leave_gaps_and_crosses(tmp_path):
    events = [start(), step(1), step(2, loss=None), step(3), step(4, grad_norm=None, applied=False), step(5)]
    found = read(written(tmp_path, events))
    cells = {row[0]: row[1:3] for row in rows(found, "Steps")}
    assert cells["2"][0] == "—"
    assert cells["4"][1] == "—"
    figures = {figure.attributes.get("id"): figure for figure in found.all("figure")}
    crosses = {
        name: [node for node in figure.all("path") if node.attributes["class"] == "cross"]
        for name, figure in figures.items()
    }
    assert [len(crosses[name]) for name in ("loss", "rate", "norm", "speed")] == [1, 0, 1, 0]
    assert crosses["loss"][0].text == "step 2: no finite training"
    assert "Left out, since a gradient was not finite: step 4." in found.text
    (line,) = [node for node in figures["loss"].all("path") if node.attributes["class"] == "line c1"]
    assert line.attributes["d"].count("M") == 1, "1 stands alone as a dot, 3 to 5 are a line"
    assert len(figures["loss"].all("circle")) == 1


def test_a_log_of_nothing_finite_is_said_to_be_so(tmp_path):
    found = read(written(tmp_path, [start(), step(1, loss=None, grad_norm=None, tokens_per_second=None)]))
    assert "There are no values yet." in found.text


def test_the_last_word_on_a_step_counts_and_half_a_line_does_not(tmp_path):
    lines = [start(), step(1), step(2, loss=9.0), start(step=1), step(2, loss=4.0)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "st')
    found = read(page(tmp_path / "log.jsonl", tmp_path / "trace.json"))
    assert [row[1] for row in rows(found, "Steps")[1:]] == ["4.875", "4"]
    assert "resumed 1 time" in found.text


def test_without_budget_and_disk(tmp_path):
    events = [start(facts={"limit": None}), step(1, limit=None), {**TRACE, "first": 4}]
    found = read(written(tmp_path, events, traced(disk=False)))
    assert "no budget" in found.text
    assert "Nothing came from the disk or went to it." in found.text
    assert not [node for node in found.all("line") if node.attributes.get("class") == "budget"]
    assert "There is no budget." in found.text
    with_both = read(written(tmp_path, WHOLE, traced()))
    assert [node for node in with_both.all("line") if node.attributes.get("class") == "budget"]


def test_a_trace_that_the_log_does_not_tell_of_is_not_the_runs(tmp_path):
    assert "No trace was recorded" in read(written(tmp_path, [start(), step(1)], traced())).text
    assert "No trace was recorded" in read(written(tmp_path, [start(), step(1), TRACE], {"traceEvents": 3})).text


def test_a_timeline_shows_what_overlapped(tmp_path):
    found = read(written(tmp_path, WHOLE, traced()))
    (figure,) = [each for each in found.all("figure") if each.attributes.get("id") == "timeline"]
    lanes = {node.attributes["class"]: node for node in figure.all("path")}
    assert set(lanes) == {"lane c4", "lane c1", "lane c5", "lane bad"}
    assert lanes["lane c1"].text == "disk reads: 2 in 100 µs, 6% of the time, 2 MiB"
    # Reads: 850 to 950, of which 880 to 920 twice; updates 900 to 1000: 50 with reads, 50 with writes.
    assert "The disk was busy for 300 µs of 1.7 ms; for 83% of that nobody waited for it." in found.text
    assert "(100 µs), the disk was reading for 50 µs and writing for 50 µs." in found.text
    calls = rows(found, "Calls of the engine")
    assert [row[0] for row in calls[1:3]] == ["forward, step 4", "backward, step 4"]
    assert calls[2][1:] == ["300 µs", "500 µs"]
    core = {row[0]: row[1:] for row in rows(found, "What the core did")}
    assert core["disk reads"] == ["2", "100 µs", "5.9%", "2 MiB", "21 GB/s"]
    assert {node.text for node in figure.all("text")} >= {"forward", "backward", "step 4", "step 5", "tiles updated"}


def test_the_height_of_the_disks_lane_is_what_was_under_way_at_once(tmp_path):
    """Two reads at once between 880 and 920 of 1700, one before and after: the lane is half and all as high."""
    found = read(written(tmp_path, WHOLE, traced()))
    (lane,) = [node for node in found.all("path") if node.attributes.get("class") == "lane c1"]
    path = lane.attributes["d"]
    low = float(path.split(" ")[1].split("H")[0])
    heights = [low - float(piece.split("V")[1]) for piece in path.removesuffix("z").split("H")[1:]]
    assert heights == [12.0, 24.0, 12.0, 0.0, 0.0]
    pixels = [float(piece.split("V")[0]) for piece in path.split("H")[1:5]]
    share = [(pixel - 132) / (960 - 12 - 132) for pixel in pixels]
    assert share == pytest.approx([850 / 1700, 880 / 1700, 920 / 1700, 950 / 1700], abs=1.5 / 816)


def test_memory_is_shown_with_what_nobody_accounts_for():
    trace = traced()
    figure = memory_figure(trace["otherData"]["memory"], 1024 * MIB, 900 * MIB)
    found = read(f'<html lang="en"><head><title>x</title></head><body>{figure}</body></html>')
    values = {row[0]: row[1:] for row in rows(found, "Memory at the ends of phases")}
    assert values[""] == ["after forward", "after backward", "after step", "after next forward"]
    assert values["gradients"] == ["200 MiB"] * 4
    assert values[OTHER] == ["468 MiB"] * 4
    assert values["resident"] == ["700 MiB"] * 4
    assert values["reserved, not resident"] == ["0 bytes"] * 4
    bars = [node for node in found.all("rect") if node.attributes["class"].startswith("part")]
    assert len(bars) == 12
    one = [node for node in bars if node.attributes["x"] == bars[0].attributes["x"]]
    heights = {node.text.split(": ")[1]: float(node.attributes["height"]) for node in one}
    per_mib = heights[f"{OTHER} 468 MiB"] / 468
    assert heights["gradients 200 MiB"] == pytest.approx(200 * per_mib, abs=0.02)
    assert heights["staging 32 MiB"] == pytest.approx(32 * per_mib, abs=0.02)


def test_what_is_reserved_and_not_resident_is_told():
    trace = traced(resident=100 * MIB)
    figure = memory_figure(trace["otherData"]["memory"], None, None)
    found = read(f'<html lang="en"><head><title>x</title></head><body>{figure}</body></html>')
    values = {row[0]: row[1:] for row in rows(found, "Memory at the ends of phases")}
    assert OTHER not in values
    assert values["reserved, not resident"] == ["132 MiB"] * 4


def test_a_budget_far_above_is_words():
    figure = memory_figure(traced()["otherData"]["memory"], 1 << 40, None)
    assert "The budget, 1 TiB, lies above the picture." in figure
    assert 'class="budget"' not in figure


def test_the_samples_of_one_step_and_the_next_forward():
    memory = traced()["otherData"]["memory"]
    assert [name for name, _ in samples_of_one_step(memory)] == [
        "after forward", "after backward", "after step", "after next forward",
    ]  # fmt: skip
    assert [name for name, _ in samples_of_one_step(memory[:3])] == ["after forward", "after backward", "after step"]
    assert samples_of_one_step([]) == []


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000), st.integers(1, 300))
def test_no_spike_is_lost(values, count):
    """Each column keeps its lowest and its highest value, and its ends; there are at most four a column."""
    points = [(float(at), value) for at, value in enumerate(values)]
    kept = thinned(points, 0.0, max(1.0, points[-1][0]), count)
    assert kept == sorted(set(kept))
    assert set(kept) <= set(points)
    assert len(kept) <= max(4 * count, 2 * count)
    for group in by_column(points, 0.0, max(1.0, points[-1][0]), count):
        inside = [value for step_, value in kept if group[0][0] <= step_ <= group[-1][0]]
        numbers = [value for _, value in group]
        assert (min(inside), max(inside)) == (min(numbers), max(numbers))


def test_a_spike_among_ten_thousand_steps_is_in_the_picture():
    points = [(at, 1.0) for at in range(10_000)]
    points[6543] = (6543, 100.0)
    figure = curve("loss", "Loss", "nats", [Series("training", points, "c1")])
    found = read(f'<html lang="en"><head><title>x</title></head><body>{figure}</body></html>')
    faint, mean = [node for node in found.all("path") if node.attributes["class"].startswith("line")]
    heights = [float(piece.split(" ")[1]) for piece in faint.attributes["d"][1:].split("L")]
    low, high = max(heights), min(heights)
    assert heights.count(high) == 1
    assert low - high > 150
    assert len(heights) < 2500
    smooth = [float(piece.split(" ")[1]) for piece in mean.attributes["d"][1:].split("L")]
    assert low - min(smooth) < 5, "100 in 84 steps raise their mean by little"
    assert "highest 100" in found.all("desc")[0].text


moments = st.integers(0, 40)
intervals = st.lists(st.tuples(moments, moments).map(sorted).map(tuple), max_size=12)


@given(intervals, intervals)
def test_times_under_way_are_counted_once(one, other):
    def ticks_of(those):
        return {tick for begin, end in those for tick in range(begin, end)}

    assert total(one) == len(ticks_of(one))
    assert overlap(one, other) == len(ticks_of(one) & ticks_of(other))
    made = union(one)
    assert all(left[1] < right[0] for left, right in itertools.pairwise(made))


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9), st.integers(2, 10))
@example(1.0, 400400401.0, 2)
def test_axes_have_round_numbers_inside(low, width, count):
    found = ticks(low, low + width, count)
    assert 1 <= len(found) <= 2 * count + 2 or width < 1e-12 * abs(low)
    margin = 1e-6 * width + 1e-9 * abs(low)
    assert all(low - margin <= value <= low + width + margin for value in found)


def test_sizes_on_axes_are_powers_of_two():
    assert byte_ticks(3000 * MIB, 5) == [each * 1024.0 * MIB for each in range(3)]
    assert Scale(0.0, 10.0, 100.0, 0.0)(2.5) == 75.0


def test_numbers_are_short():
    assert [number(value) for value in (None, 3.0, 0.000123456, 12345.678, 1e-9, 40000)] == [
        "—", "3", "0.0001235", "12,346", "1e-09", "40,000",
    ]  # fmt: skip
    assert [seconds(value) for value in (2.5, 0.0125, 2e-5, 0.0)] == ["2.5 s", "12.5 ms", "20 µs", "0 µs"]


def test_markup_escapes_what_is_not_markup():
    made = element("p", "<b>", Markup("<i></i>"), class_='"', aria_label="x", view_box="0 0 1 1", x=1.2345, y=None)
    assert made == '<p class="&quot;" aria-label="x" viewBox="0 0 1 1" x="1.23">&lt;b&gt;<i></i></p>'


def test_the_command_writes_the_page_into_the_folder(tmp_path, capsys):
    written(tmp_path, WHOLE, traced())
    assert zeroxide.cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert "finished after step 5" in read((tmp_path / "report.html").read_text()).text
    assert zeroxide.cli.main(["report", str(tmp_path / "none")]) == 2
    assert "holds no run (no log.jsonl)" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "report.html", "trace.json"]


def test_a_trace_is_read_in_seconds(tmp_path):
    (tmp_path / "trace.json").write_text(json.dumps(traced()))
    found = read_timeline(tmp_path / "trace.json")
    assert found.steps == [4, 5]
    assert found.end == pytest.approx(1700e-6)
    assert found.moved == {"update": MIB, "read": 2 * MIB, "write": MIB, "disk wait": 0}
    assert read_timeline(tmp_path / "none.json") is None

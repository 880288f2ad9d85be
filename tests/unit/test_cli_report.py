import io
import json
import math

import pytest

from zeroxide.cli.training.plot import read, smoothed
from zeroxide.cli.training.report import Reporter, StepFigures, describe_memory


def figures(**changes):
    values = {
        "step": 7, "loss": 3.25, "grad_norm": 0.5, "lr": 1e-4, "tokens": 1000, "seconds": 2.0, "forward_seconds": 0.5,
        "backward_seconds": 1.0, "step_seconds": 0.5, "rss": 1 << 30, "peak_rss": 1 << 30, "limit": 2 << 30,
        "read_bytes": 4_000_000_000, "write_bytes": 1_000_000_000, "io_busy_seconds": 2.0, "io_wait_seconds": 0.5,
    }  # fmt: skip
    return StepFigures(**{**values, **changes})


def test_a_line_holds_every_figure():
    assert figures().line(100) == (
        "step   7/100  loss  3.2500  norm  0.500  lr 1.00e-04    500.0 tok/s  rss 1.00/2.00 GiB"
        "  disk r 2.00 w 0.50 GB/s  hidden  75%"
    )


def test_what_there_is_not_is_left_out():
    line = figures(read_bytes=0, write_bytes=0, io_busy_seconds=0.0, limit=None, grad_norm=None).line(7)
    assert "disk" not in line
    assert "hidden" not in line
    assert "rss 1.00 GiB" in line
    assert "norm    -" in line


def test_hidden_is_a_share():
    assert figures(io_wait_seconds=5.0).hidden == 0.0
    assert figures(io_wait_seconds=-0.1).hidden == 1.0
    assert figures(io_busy_seconds=0.0).hidden is None


def test_no_bar_and_no_escape_codes_outside_a_terminal():
    stream = io.StringIO()
    reporter = Reporter(stream)
    reporter.start(0, 10)
    reporter.step(figures(), 10)
    reporter.close()
    assert stream.getvalue() == figures().line(10) + "\n"


def test_a_bar_on_a_terminal_leaves_the_lines_whole():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    reporter = Reporter(stream)
    reporter.start(0, 10)
    reporter.step(figures(), 10)
    reporter.say("[not markup]")
    reporter.close()
    assert figures().line(10) in stream.getvalue()
    assert "[not markup]" in stream.getvalue()
    assert "7/10" in stream.getvalue()


def test_the_log_is_json_whatever_the_numbers(tmp_path):
    path = tmp_path / "log.jsonl"
    reporter = Reporter(io.StringIO())
    reporter.event("lost")
    reporter.open_log(path, append=False)
    reporter.event("step", loss=math.nan, nested={"a": [math.inf, 1.0]})
    reporter.step(figures(), 10)
    reporter.close()
    first, second = map(json.loads, path.read_text().splitlines())
    assert first["loss"] is None
    assert first["nested"] == {"a": [None, 1.0]}
    assert second["read_gb_per_second"] == 2.0
    reporter.open_log(path, append=True)
    reporter.event("more")
    reporter.close()
    assert len(path.read_text().splitlines()) == 3


def test_memory_lines_compare_plan_and_outcome():
    memory = {
        "weights": {"current": 0, "peak": 3 << 20},
        "staging": {"current": 0, "peak": 0},
        "process": {},
        "limit": 5,
    }
    assert describe_memory({"weights": 2 << 20}, memory) == ["weights    expected 2 MiB, peak 3 MiB"]


def test_the_process_is_compared_where_something_was_expected_of_it():
    memory = {"weights": {"peak": 0}, "process": {"peak": 3 << 30}, "limit": None}
    assert describe_memory({"process": 2 << 30}, memory) == ["process    expected 2 GiB, peak 3 GiB"]
    assert describe_memory({}, memory) == []


def test_the_plot_takes_the_last_word_on_a_step(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [
        {"event": "step", "step": 1, "loss": 5.0},
        {"event": "step", "step": 2, "loss": 4.0},
        {"event": "step", "step": 2, "loss": 3.0},
        {"event": "step", "step": 3, "loss": None},
        {"event": "eval", "step": 2, "loss": 3.5},
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "st')
    assert read(log) == ({1: 5.0, 2: 3.0}, {2: 3.5})


def test_smoothing_starts_at_the_first_value():
    assert smoothed([2.0, 2.0, 2.0]) == [2.0, 2.0, 2.0]
    assert smoothed([]) == []


@pytest.mark.parametrize(("steps", "lag"), [(5, 0), (60, 5), (1000, 9)])
def test_the_smoothed_curve_lags_by_less_than_a_tenth_of_the_run(steps, lag):
    """On a line the average of weights (1 - k) k^i lies k / (1 - k) steps behind: n - 1 for k = 1 - 1/n."""
    assert smoothed([float(step) for step in range(steps)])[-1] == pytest.approx(steps - 1 - lag, abs=0.01)

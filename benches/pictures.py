"""README's pictures of memory and of speed beside DeepSpeed, and that of state formats, from what benchmarks printed.

    python benches/hf_trainer.py --allocator default > benches/results/hf_trainer.jsonl
    python benches/pictures.py benches/results/hf_trainer.jsonl docs/pictures
    python benches/format_loss.py > benches/results/format_loss.jsonl
    python benches/pictures.py benches/results/format_loss.jsonl docs/pictures

Bars are drawn as they were measured; nothing is left out but settings that a reader did not choose: the bars are those
of configs in which nothing is tuned ("defaults") and of DeepSpeed's least memory ("lean").
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

__all__ = ["Bar", "draw", "formats", "memory", "pictures", "read", "speed"]

WIDTH, LEFT, ROW, TOP = 740, 240, 28, 58
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328; }
.title { font-weight: 600; font-size: 16px; }
.group { font-weight: 600; }
.foot { font-size: 12px; fill: #59636e; }
.theirs { fill: #9aa4b2; }
.ours { fill: #d9622b; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .foot { fill: #9198a1; }
  .theirs { fill: #6e7681; }
  .ours { fill: #f0883e; }
}
"""


@dataclass(frozen=True)
class Bar:
    """One contestant."""

    group: str
    """Contestants of a group are beside one another, under its name."""
    label: str
    value: float
    shown: str
    ours: bool


def read(lines: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The results of contestants, by name."""
    found = (json.loads(line) for line in lines if line.strip())
    return {each["contestant"]: each for each in found if "contestant" in each}


def _bars(results: dict[str, dict[str, Any]], value: Callable[[dict[str, Any]], float], shown: str) -> list[Bar]:
    bars = []
    for home, group in (("nvme", "State on disk"), ("cpu", "State in host memory")):
        for who, settings, tuned in (
            ("deepspeed", "defaults", ""),
            ("deepspeed", "lean", ", tuned for memory"),
            ("zeroxide", "defaults", ""),
        ):
            found = value(results[f"{who} {home} {settings}"])
            name = "DeepSpeed" if who == "deepspeed" else "zeroxide"
            bars.append(Bar(group, f"{name}{tuned}", found, shown.format(found), who == "zeroxide"))
    return bars


def memory(results: dict[str, dict[str, Any]]) -> list[Bar]:
    """Peak resident memory, in GiB."""
    return _bars(results, lambda each: each["peak_bytes"] / 2**30, "{:.2f} GiB")


def speed(results: dict[str, dict[str, Any]]) -> list[Bar]:
    """Seconds of a whole step."""
    return _bars(results, lambda each: each["step"]["median"], "{:.2f} s")


def draw(title: str, foot: str, bars: list[Bar]) -> str:
    """An SVG image of horizontal bars from 0, readable on light and on dark ground."""
    groups = list(dict.fromkeys(bar.group for bar in bars))
    height = TOP + ROW * (len(bars) + len(groups)) + 34
    longest = max(bar.value for bar in bars)
    described = "; ".join(f"{bar.group}, {bar.label}: {bar.shown}" for bar in bars)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-labelledby="title description">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="description">{escape(described)}</desc>',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="0" y="24">{escape(title)}</text>',
    ]
    y = TOP
    for group in groups:
        parts.append(f'<text class="group" x="0" y="{y + 5}">{escape(group)}</text>')
        y += ROW
        for bar in (each for each in bars if each.group == group):
            length, kind = (WIDTH - LEFT - 90) * bar.value / longest, "ours" if bar.ours else "theirs"
            parts += [
                f'<text x="{LEFT - 8}" y="{y + 5}" text-anchor="end">{escape(bar.label)}</text>',
                f'<rect class="{kind}" x="{LEFT}" y="{y - 9}" width="{length:.1f}" height="18"/>',
                f'<text x="{LEFT + length + 8:.1f}" y="{y + 5}">{escape(bar.shown)}</text>',
            ]
            y += ROW
    parts += [f'<text class="foot" x="0" y="{height - 8}">{escape(foot)}</text>', "</svg>"]
    return "\n".join(parts) + "\n"


def pictures(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The images by file name."""
    what = "Hugging Face's Trainer, GPT-2 124 M, ZeRO-3"
    foot = "bf16 on two cores; shorter is better. benches/hf_trainer.py; docs/benchmarks.md has machine and versions."
    return {
        "memory.svg": draw(f"Peak memory: {what}", foot, memory(results)),
        "speed.svg": draw(f"A whole step: {what}", foot, speed(results)),
    }


def formats(lines: Iterable[str]) -> dict[str, str]:
    """The image of the bytes that weights and optimizer state take in each format, from the lines of `format_loss.py`.

    Losses are means over the seeds that a contestant has.
    """
    found = [each for each in map(json.loads, lines) if each["bench"] == "format_loss"]
    bars = []
    for name in dict.fromkeys(each["contestant"] for each in found):
        runs = [each for each in found if each["contestant"] == name]
        loss, size = statistics.mean(each["held_out"] for each in runs), runs[0]["bytes_per_parameter"]
        ours = " " not in name
        group = "zeroxide" if ours else "Others, over fp32 master weights"
        bars.append(Bar(group, name, size, f"{size:.1f}, {loss:.3f}", ours))
    bars.sort(key=lambda bar: (bar.ours, -bar.value))
    title = "Bytes of weights and optimizer state a parameter, and loss after 2,000 steps"
    foot = "Loss of text left out, a GPT of 1.0 M parameters. benches/format_loss.py; docs/benchmarks.md has the seeds."
    return {"formats.svg": draw(title, foot, bars)}


def main() -> None:
    source, folder = (Path(each) for each in sys.argv[1:3])
    folder.mkdir(parents=True, exist_ok=True)
    lines = source.read_text(encoding="utf-8").splitlines()
    made = formats(lines) if any('"format_loss"' in line for line in lines) else pictures(read(lines))
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
